// Binding of block_attention: checks the tensors and calls the launcher of this module's device.
#pragma once

#include "block_attention/block_attention.h"
#include "common/binding.h"

namespace cfpp {
namespace {

constexpr const char* kOp = "block_attention";

// Checks all tensors but the outputs and returns the params without the pointers to them.
BlockAttentionParams read_params(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& ranges,
                                 double scale) {
  check_shape(q, {{"B", -1}, {"H", -1}, {"Sq", -1}, {"D", -1}});
  BlockAttentionParams p{};
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.queries = q.size(2);
  p.head_dim = q.size(3);
  if (q.numel() == 0 || p.head_dim % 2) q.refuse("[B, H, Sq, D], none of them 0 and D even", q.shape_text());
  check_shape(k_cache, {{"B", p.batch}, {"H", p.heads}, {"capacity", -1}, {"D", p.head_dim}});
  p.capacity = k_cache.size(2);
  check_shape(v_cache, {{"B", p.batch}, {"H", p.heads}, {"capacity", p.capacity}, {"D", p.head_dim}});
  for (const Tensor* rows : {&q, &k_cache, &v_cache}) check_contiguous_rows(*rows);
  check_ranges(ranges, p.batch, p.queries);
  p.groups = ranges.size(1);
  p.ranges = ranges.size(2);
#if CFPP_CUDA
  check_dtype(q, {DType::kBFloat16, DType::kFloat16});
#else
  check_dtype(q, {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
#endif
  for (const Tensor* like : {&k_cache, &v_cache}) check_same_dtype(*like, q);
  check_device(q, CFPP_CUDA);
  for (const Tensor* near : {&k_cache, &v_cache, &ranges}) check_same_device(*near, q);
  p.dtype = q.dtype();
  p.q_ptr = q.data();
  p.k_ptr = k_cache.data();
  p.v_ptr = v_cache.data();
  p.ranges_ptr = ranges.data<int32_t>();
  q.copy_strides(p.q_stride);
  k_cache.copy_strides(p.k_stride);
  v_cache.copy_strides(p.v_stride);
  p.scale = static_cast<float>(scale);
  return p;
}

void set_out(BlockAttentionParams& p, const Tensor& out, const Tensor& q) {
  check_shape(out, {{"B", p.batch}, {"Sq", p.queries}, {"H*D", p.heads * p.head_dim}});
  check_contiguous(out);
  check_same_dtype(out, q);
  check_same_device(out, q);
  p.out_ptr = out.data();
}

#if CFPP_CUDA

// Returns the bytes of workspace for tensors of this shape and dtype on q's device.
int64_t workspace_bytes(py::handle q_object, py::handle k_object, py::handle v_object, py::handle ranges_object) {
  const Tensor q(kOp, "q", q_object), k_cache(kOp, "k_cache", k_object), v_cache(kOp, "v_cache", v_object);
  const BlockAttentionParams p = read_params(q, k_cache, v_cache, Tensor(kOp, "ranges", ranges_object), 1.0);
  int64_t bytes = 0;
  const Status status = block_attention_workspace(p, q.device_index(), &bytes);
  if (!status.empty()) raise_input_error(status);
  return bytes;
}

void block_attention(py::handle out_object, py::handle workspace_object, py::handle q_object, py::handle k_object,
                     py::handle v_object, py::handle ranges_object, double scale) {
  const Tensor q(kOp, "q", q_object), k_cache(kOp, "k_cache", k_object), v_cache(kOp, "v_cache", v_object);
  const Tensor ranges(kOp, "ranges", ranges_object), workspace(kOp, "workspace", workspace_object);
  BlockAttentionParams p = read_params(q, k_cache, v_cache, ranges, scale);
  set_out(p, Tensor(kOp, "out", out_object), q);
  int64_t wanted = 0;
  const Status status = block_attention_workspace(p, q.device_index(), &wanted);
  if (!status.empty()) raise_input_error(status);
  check_same_device(workspace, q);
  check_contiguous(workspace);
  const int64_t given = workspace.numel() * size_of(workspace.dtype());
  if (given < wanted) workspace.refuse(std::to_string(wanted) + " bytes or more", std::to_string(given));
  p.workspace_ptr = workspace.data();
  raise_launch_error(block_attention_cuda(p, q.device_index(), q.current_stream()));
}

#else

void block_attention(py::handle out_object, py::handle q_object, py::handle k_object, py::handle v_object,
                     py::handle ranges_object, double scale, int num_threads) {
  const Tensor q(kOp, "q", q_object), k_cache(kOp, "k_cache", k_object), v_cache(kOp, "v_cache", v_object);
  BlockAttentionParams p = read_params(q, k_cache, v_cache, Tensor(kOp, "ranges", ranges_object), scale);
  set_out(p, Tensor(kOp, "out", out_object), q);
  run_without_gil([&] { return block_attention_cpu(p, num_threads); });
}

#endif

}  // namespace

inline void register_block_attention(py::module_& m) {
  m.def("block_attention", &block_attention);
#if CFPP_CUDA
  m.def("block_attention_workspace", &workspace_bytes);
#endif
}

}  // namespace cfpp

// Binding of kv_dequantize_: checks the tensors and calls the launcher of this module's device.
#pragma once

#include "common/binding.h"
#include "kv_dequantize/kv_dequantize.h"

namespace cfpp {
namespace {

void kv_dequantize(py::handle k_out_object, py::handle v_out_object, py::handle k_cache_object,
                   py::handle v_cache_object, py::handle k_scale_object, py::handle v_scale_object,
                   py::handle ranges_object, [[maybe_unused]] int num_threads) {
  const auto tensor = [](const char* name, py::handle object) { return Tensor("kv_dequantize_", name, object); };
  const Tensor k_out = tensor("k_out", k_out_object), v_out = tensor("v_out", v_out_object);
  const Tensor k_cache = tensor("k_cache", k_cache_object), v_cache = tensor("v_cache", v_cache_object);
  const Tensor k_scale = tensor("k_scale", k_scale_object), v_scale = tensor("v_scale", v_scale_object);
  const Tensor ranges = tensor("ranges", ranges_object);

  if (k_cache.dim() != 4 || k_cache.size(3) % 2) k_cache.refuse("[B, H, capacity, even D]", k_cache.shape_text());
  KvDequantizeParams p{};
  p.batch = k_cache.size(0);
  p.heads = k_cache.size(1);
  p.capacity = k_cache.size(2);
  p.head_dim = k_cache.size(3);
  for (const Tensor* rows : {&v_cache, &k_out, &v_out}) {
    check_shape(*rows, {{"B", p.batch}, {"H", p.heads}, {"capacity", p.capacity}, {"D", p.head_dim}});
  }
  for (const Tensor* rows : {&k_cache, &v_cache, &k_out, &v_out}) check_contiguous_rows(*rows);
  for (const Tensor* scale : {&k_scale, &v_scale}) {
    check_shape(*scale, {{"B", p.batch}, {"H", p.heads}});
    check_dtype(*scale, DType::kFloat32);
    check_contiguous(*scale);
  }
  check_ranges(ranges, p.batch);
  p.groups = ranges.size(1);
  p.ranges = ranges.size(2);
  for (const Tensor* cache : {&k_cache, &v_cache}) check_dtype(*cache, DType::kFloat8E4M3);
  check_dtype(k_out, {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  check_same_dtype(v_out, k_out);
  check_device(k_out, CFPP_CUDA);
  for (const Tensor* near : {&v_out, &k_cache, &v_cache, &k_scale, &v_scale, &ranges}) check_same_device(*near, k_out);
  if (k_out.numel() == 0) return;

  p.dtype = k_out.dtype();
  p.k_out_ptr = k_out.data();
  p.v_out_ptr = v_out.data();
  p.k_cache_ptr = k_cache.data<uint8_t>();
  p.v_cache_ptr = v_cache.data<uint8_t>();
  p.k_scale_ptr = k_scale.data<float>();
  p.v_scale_ptr = v_scale.data<float>();
  p.ranges_ptr = ranges.data<int32_t>();
  k_out.copy_strides(p.k_out_stride);
  v_out.copy_strides(p.v_out_stride);
  k_cache.copy_strides(p.k_cache_stride);
  v_cache.copy_strides(p.v_cache_stride);
#if CFPP_CUDA
  raise_launch_error(kv_dequantize_cuda(p, k_out.device_index(), k_out.current_stream()));
#else
  run_without_gil([&] { return kv_dequantize_cpu(p, num_threads); });
#endif
}

}  // namespace

inline void register_kv_dequantize(py::module_& m) { m.def("kv_dequantize_", &kv_dequantize); }

}  // namespace cfpp

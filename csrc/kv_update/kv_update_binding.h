// Binding of kv_update_: checks the tensors and calls the launcher of this module's device.
#pragma once

#include "common/binding.h"
#include "kv_update/kv_update.h"

namespace cfpp {
namespace {

void check_rotation(const Tensor& time, const Tensor& row, const Tensor& column, int64_t batch, int64_t head_dim) {
  check_shape(time, {{"B", batch}, {"F", -1}, {"n_time", -1}, {"(cos, sin)", 2}});
  check_shape(row, {{"rows", -1}, {"n_row", -1}, {"(cos, sin)", 2}});
  check_shape(column, {{"columns", -1}, {"n_column", -1}, {"(cos, sin)", 2}});
  const int64_t pairs = time.size(2) + row.size(1) + column.size(1);
  if (2 * pairs != head_dim) {
    raise_input_error("kv_update_: rope_t, rope_h, rope_w must be (cos, sin) of D/2=" + std::to_string(head_dim / 2) +
                      " pairs together, got " + std::to_string(pairs));
  }
  for (const Tensor* table : {&time, &row, &column}) check_dtype(*table, DType::kFloat32);
  check_contiguous(row);
  check_contiguous(column);
  if ((time.size(2) > 1 && time.stride(2) != 2) || time.stride(3) != 1) {
    time.refuse("contiguous in its last two dimensions", time.strides_text() + " as strides");
  }
}

void kv_update(py::handle q_out_object, py::handle k_cache_object, py::handle v_cache_object, py::handle q_object,
               py::handle k_object, py::handle v_object, py::handle q_norm_object, py::handle k_norm_object,
               py::handle rope_t_object, py::handle rope_h_object, py::handle rope_w_object,
               py::handle write_index_object, double eps, py::handle k_scale_object, py::handle v_scale_object,
               [[maybe_unused]] int num_threads) {
  const auto tensor = [](const char* name, py::handle object) { return Tensor("kv_update_", name, object); };
  const Tensor q_out = tensor("q_out", q_out_object), k_cache = tensor("k_cache", k_cache_object);
  const Tensor v_cache = tensor("v_cache", v_cache_object), q = tensor("q", q_object);
  const Tensor k = tensor("k", k_object), v = tensor("v", v_object);
  const Tensor q_norm = tensor("q_norm", q_norm_object), k_norm = tensor("k_norm", k_norm_object);
  const Tensor rope_t = tensor("rope_t", rope_t_object), rope_h = tensor("rope_h", rope_h_object);
  const Tensor rope_w = tensor("rope_w", rope_w_object), write_index = tensor("write_index", write_index_object);

  if (k_cache.dim() != 4 || k_cache.size(3) % 2) k_cache.refuse("[B, H, capacity, even D]", k_cache.shape_text());
  KvUpdateParams p{};
  p.batch = k_cache.size(0);
  p.heads = k_cache.size(1);
  p.capacity = k_cache.size(2);
  p.head_dim = k_cache.size(3);
  check_rotation(rope_t, rope_h, rope_w, p.batch, p.head_dim);
  p.frames = rope_t.size(1);
  p.rows = rope_h.size(0);
  p.columns = rope_w.size(0);
  p.time_pairs = rope_t.size(2);
  p.row_pairs = rope_h.size(1);
  p.column_pairs = rope_w.size(1);
  if (p.tokens() < 1) raise_input_error("kv_update_: S = F * rows * columns must be at least 1, got 0");

  for (const Tensor* row : {&q, &k, &v}) {
    check_shape(*row, {{"B", p.batch}, {"S", p.tokens()}, {"H*D", p.channels()}});
    check_contiguous_rows(*row);
  }
  check_shape(v_cache, {{"B", p.batch}, {"H", p.heads}, {"capacity", p.capacity}, {"D", p.head_dim}});
  check_contiguous_rows(k_cache);
  check_contiguous_rows(v_cache);
  check_shape(q_out, {{"B", p.batch}, {"H", p.heads}, {"S", p.tokens()}, {"D", p.head_dim}});
  check_contiguous(q_out);
  for (const Tensor* norm : {&q_norm, &k_norm}) {
    check_shape(*norm, {{"H*D", p.channels()}});
    check_contiguous(*norm);
  }
  p.groups = write_index.dim() == 2 ? write_index.size(1) : 0;
  if (p.groups < 1 || write_index.size(0) != p.batch || p.tokens() % p.groups) {
    write_index.refuse("[B=" + std::to_string(p.batch) + ", G] with G a divisor of S=" + std::to_string(p.tokens()),
                       write_index.shape_text());
  }
  check_dtype(write_index, DType::kInt32);
  check_dtype(q, {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  for (const Tensor* like : {&q_out, &k, &v, &q_norm, &k_norm}) check_same_dtype(*like, q);
  check_device(q, CFPP_CUDA);
  for (const Tensor* near :
       {&q_out, &k_cache, &v_cache, &k, &v, &q_norm, &k_norm, &rope_t, &rope_h, &rope_w, &write_index}) {
    check_same_device(*near, q);
  }

  if (k_scale_object.is_none() && v_scale_object.is_none()) {
    for (const Tensor* cache : {&k_cache, &v_cache}) {
      if (cache->dtype() == DType::kFloat8E4M3) {
        raise_input_error("kv_update_: k_scale and v_scale must be given for caches in torch.float8_e4m3fn, got None");
      }
      check_same_dtype(*cache, q);
    }
  } else {
    const Tensor k_scale = tensor("k_scale", k_scale_object), v_scale = tensor("v_scale", v_scale_object);
    for (const Tensor* cache : {&k_cache, &v_cache}) check_dtype(*cache, DType::kFloat8E4M3);
    for (const Tensor* scale : {&k_scale, &v_scale}) {
      check_shape(*scale, {{"B", p.batch}, {"H", p.heads}});
      check_dtype(*scale, DType::kFloat32);
      check_contiguous(*scale);
      check_same_device(*scale, q);
    }
    p.k_scale_ptr = k_scale.data<float>();
    p.v_scale_ptr = v_scale.data<float>();
  }

  p.dtype = q.dtype();
  p.cache_dtype = k_cache.dtype();
  p.k_cache_ptr = k_cache.data();
  p.v_cache_ptr = v_cache.data();
  p.q_out_ptr = q_out.data();
  p.q_ptr = q.data();
  p.k_ptr = k.data();
  p.v_ptr = v.data();
  p.q_norm_ptr = q_norm.data();
  p.k_norm_ptr = k_norm.data();
  p.rope_t_ptr = rope_t.data<float>();
  p.rope_h_ptr = rope_h.data<float>();
  p.rope_w_ptr = rope_w.data<float>();
  p.write_index_ptr = write_index.data<int32_t>();
  k_cache.copy_strides(p.k_cache_stride);
  v_cache.copy_strides(p.v_cache_stride);
  q.copy_strides(p.q_stride);
  k.copy_strides(p.k_stride);
  v.copy_strides(p.v_stride);
  rope_t.copy_strides(p.rope_t_stride);
  write_index.copy_strides(p.write_index_stride);
  p.eps = static_cast<float>(eps);
#if CFPP_CUDA
  raise_launch_error(kv_update_cuda(p, q.device_index(), q.current_stream()));
#else
  run_without_gil([&] { return kv_update_cpu(p, num_threads); });
#endif
}

}  // namespace

inline void register_kv_update(py::module_& m) { m.def("kv_update_", &kv_update); }

}  // namespace cfpp

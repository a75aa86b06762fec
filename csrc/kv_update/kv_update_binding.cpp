// Python's integers to KvUpdateParams. Shapes, dtypes and devices have been checked by cfpp_rt/ops/kv_update.py.
#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>

#include "kv_update/kv_update.h"

namespace py = pybind11;

namespace cfpp {
namespace {

// Reads a tuple of integers in order.
class Reader {
 public:
  explicit Reader(const py::tuple& values) : values_(values.ptr()), size_(PyTuple_GET_SIZE(values.ptr())) {}
  int64_t integer() {
    if (next_ >= size_) throw std::invalid_argument("kv_update_: too few integers");
    const int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(values_, next_++));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  template <typename T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(integer()));
  }
  template <size_t kCount>
  void integers(int64_t (&out)[kCount]) {
    for (int64_t& value : out) value = integer();
  }
  void finish() const {
    if (next_ != size_) throw std::invalid_argument("kv_update_: too many integers");
  }

 private:
  PyObject* values_;
  Py_ssize_t size_;
  Py_ssize_t next_ = 0;
};

KvUpdateParams read_params(int dtype, const py::tuple& pointers, const py::tuple& layout, double eps) {
  KvUpdateParams p{};
  p.dtype = static_cast<DType>(dtype);
  Reader in(pointers);
  p.k_cache_ptr = in.pointer<void>();
  p.v_cache_ptr = in.pointer<void>();
  p.q_out_ptr = in.pointer<void>();
  p.q_ptr = in.pointer<const void>();
  p.k_ptr = in.pointer<const void>();
  p.v_ptr = in.pointer<const void>();
  p.q_norm_ptr = in.pointer<const void>();
  p.k_norm_ptr = in.pointer<const void>();
  p.rope_t_ptr = in.pointer<const float>();
  p.rope_h_ptr = in.pointer<const float>();
  p.rope_w_ptr = in.pointer<const float>();
  p.write_index_ptr = in.pointer<const int32_t>();
  in.finish();
  Reader sizes(layout);
  for (int64_t* field : {&p.batch, &p.heads, &p.head_dim, &p.capacity, &p.frames, &p.rows, &p.columns, &p.groups,
                         &p.time_pairs, &p.row_pairs, &p.column_pairs}) {
    *field = sizes.integer();
  }
  sizes.integers(p.k_cache_stride);
  sizes.integers(p.v_cache_stride);
  sizes.integers(p.q_stride);
  sizes.integers(p.k_stride);
  sizes.integers(p.v_stride);
  sizes.integers(p.rope_t_stride);
  sizes.integers(p.write_index_stride);
  sizes.finish();
  p.eps = static_cast<float>(eps);
  return p;
}

#if CFPP_CUDA
void kv_update(int dtype, const py::tuple& pointers, const py::tuple& layout, double eps, int device, int64_t stream) {
  const KvUpdateParams params = read_params(dtype, pointers, layout, eps);
  const Status status = kv_update_cuda(params, device, reinterpret_cast<void*>(stream));
  if (!status.empty()) throw std::runtime_error(status);
}
#else
void kv_update(int dtype, const py::tuple& pointers, const py::tuple& layout, double eps, int num_threads) {
  const KvUpdateParams params = read_params(dtype, pointers, layout, eps);
  Status status;
  {
    py::gil_scoped_release release;
    status = kv_update_cpu(params, num_threads);
  }
  if (!status.empty()) throw py::value_error(status);
}
#endif

}  // namespace

void register_kv_update(py::module_& m) { m.def("kv_update_", &kv_update); }

}  // namespace cfpp

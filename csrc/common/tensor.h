// A Python tensor in a binding, without torch: the description that DLPack gives of it, valid for one call.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "common/dispatch.h"
#include "common/dlpack.h"

namespace cfpp {

namespace py = pybind11;

// Throws cfpp_rt.errors.InputError, a ValueError.
[[noreturn]] inline void raise_input_error(const std::string& message) {
  py::set_error(py::module_::import("cfpp_rt.errors").attr("InputError"), message.c_str());
  throw py::error_already_set();
}

namespace dlpack {

// Returns the exchange functions of a tensor type, or null if it has none; cached per type. The types that occur
// are torch.Tensor and nn.Parameter, so a list is the fastest map. Needs the GIL.
inline const ExchangeApi* exchange_api(PyTypeObject* type) {
  static auto& known = *new std::vector<std::pair<PyTypeObject*, const ExchangeApi*>>;
  for (const auto& [seen, api] : known) {
    if (seen == type) return api;
  }
  const py::handle python_type(reinterpret_cast<PyObject*>(type));
  const ExchangeApi* api = nullptr;
  if (py::hasattr(python_type, "__dlpack_c_exchange_api__")) {
    const py::object capsule = python_type.attr("__dlpack_c_exchange_api__");
    api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) throw py::error_already_set();
    while (api != nullptr && api->version.major != 1) api = api->older;
    if (api != nullptr && api->view_from_object == nullptr) api = nullptr;
  }
  python_type.inc_ref();  // so that no other type ever gets this address
  known.emplace_back(type, api);
  return api;
}

}  // namespace dlpack

// One tensor argument. `op` and `name` are string literals that errors begin with. Shape and strides are copies;
// data() is valid while the Python object lives. Throws InputError for an object that is not a tensor, has more than
// kMaxDims dimensions, lies on neither CPU nor CUDA, or has a dtype without a DType.
class Tensor {
 public:
  static constexpr int kMaxDims = 8;

  Tensor(const char* op, const char* name, py::handle object) : op_(op), name_(name) {
    api_ = dlpack::exchange_api(Py_TYPE(object.ptr()));
    if (api_ != nullptr) {
      dlpack::View view{};
      if (api_->view_from_object(object.ptr(), &view) != 0) refuse_with_python_error();
      read(view);
    } else {
      read_capsule(object);
    }
  }

  // Throws InputError: "<op>: <name> must be <wanted>, got <got>".
  [[noreturn]] void refuse(const std::string& wanted, const std::string& got) const {
    raise_input_error(std::string(op_) + ": " + name_ + " must be " + wanted + ", got " + got);
  }

  const char* name() const { return name_; }
  // Address of the first element, byte offset included; unspecified where numel() == 0.
  template <typename T = void>
  T* data() const {
    return static_cast<T*>(data_);
  }
  DType dtype() const { return dtype_; }
  bool is_cuda() const { return is_cuda_; }
  int device_index() const { return device_index_; }  // of the GPU; 0 for the CPU
  int dim() const { return dim_; }
  int64_t size(int axis) const { return shape_[axis]; }
  // In elements. An axis of size 0 or 1 is never stepped along, so its stride reads 0 whatever the tensor says.
  int64_t stride(int axis) const { return strides_[axis]; }
  // Copies the strides of the first axes.
  template <size_t kCount>
  void copy_strides(int64_t (&out)[kCount]) const {
    static_assert(kCount <= kMaxDims);
    for (size_t i = 0; i < kCount; ++i) out[i] = strides_[i];
  }
  int64_t numel() const {
    int64_t count = 1;
    for (int i = 0; i < dim_; ++i) count *= shape_[i];
    return count;
  }
  bool is_contiguous() const {
    int64_t wanted = 1;
    for (int i = dim_ - 1; i >= 0; --i) {
      if (shape_[i] > 1 && strides_[i] != wanted) return false;
      wanted *= shape_[i];
    }
    return true;
  }

  // The stream (cudaStream_t) that torch queues work of this CUDA tensor's device on.
  void* current_stream() const {
    if (api_ == nullptr) {
      const py::object stream = py::module_::import("torch.cuda").attr("current_stream")(device_index_);
      return reinterpret_cast<void*>(stream.attr("cuda_stream").cast<intptr_t>());
    }
    void* stream = nullptr;
    if (api_->current_stream(dlpack::kCuda, device_index_, &stream) != 0) throw py::error_already_set();
    return stream;
  }

  std::string shape_text() const { return text_of(shape_); }
  std::string strides_text() const { return text_of(strides_); }
  std::string device_text() const { return is_cuda_ ? "cuda:" + std::to_string(device_index_) : "cpu"; }

 private:
  std::string text_of(const int64_t* values) const {
    std::string text = "[";
    for (int i = 0; i < dim_; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
    return text + "]";
  }

  // Older torch (and other libraries): a capsule, which frees its description when it is destroyed after the call.
  void read_capsule(py::handle object) {
    if (!py::hasattr(object, "__dlpack__")) refuse("a tensor", py::str(py::type::handle_of(object).attr("__name__")));
    try {
      // torch exports no tensor that requires a gradient; the bindings only need the data.
      capsule_ = py::getattr(object, "requires_grad", py::bool_(false)).cast<bool>()
                     ? object.attr("detach")()
                     : py::reinterpret_borrow<py::object>(object);
      const bool on_cpu = py::tuple(capsule_.attr("__dlpack_device__")())[0].cast<int>() == dlpack::kCpu;
      // -1: no synchronisation, the kernel runs on the stream that is current.
      capsule_ = on_cpu ? capsule_.attr("__dlpack__")() : capsule_.attr("__dlpack__")(py::arg("stream") = -1);
    } catch (py::error_already_set& error) {
      error.restore();
      refuse_with_python_error();
    }
    const auto* managed = static_cast<const dlpack::Managed*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
    if (managed == nullptr) throw py::error_already_set();
    read(managed->view);
  }

  [[noreturn]] void refuse_with_python_error() const {
    const py::error_already_set error;  // takes the error that is set
    const std::string text = py::str(error.value());
    refuse("a dense tensor that DLPack can describe", text.substr(0, text.find('\n')));  // torch adds its stack
  }

  void read(const dlpack::View& view) {
    if (view.ndim > kMaxDims) refuse("of at most 8 dimensions", std::to_string(view.ndim));
    data_ = static_cast<char*>(view.data) + view.byte_offset;
    dim_ = view.ndim;
    int64_t dense = 1;
    for (int i = dim_ - 1; i >= 0; --i) {
      shape_[i] = view.shape[i];
      strides_[i] = shape_[i] <= 1 ? 0 : view.strides != nullptr ? view.strides[i] : dense;
      dense *= shape_[i];
    }
    if (view.data == nullptr && dense > 0) refuse("a tensor with memory", "a fake or functional tensor");
    is_cuda_ = view.device.type == dlpack::kCuda || view.device.type == dlpack::kCudaManaged;
    if (!is_cuda_ && view.device.type != dlpack::kCpu && view.device.type != dlpack::kCudaHost) {
      refuse("on cpu or cuda", "DLPack device type " + std::to_string(view.device.type));
    }
    device_index_ = is_cuda_ ? view.device.index : 0;
    dtype_ = read_dtype(view.dtype);
  }

  DType read_dtype(dlpack::DataType type) const {
    if (type.lanes == 1) {
      switch (type.code << 8 | type.bits) {
        case dlpack::kFloat << 8 | 32:
          return DType::kFloat32;
        case dlpack::kBFloat << 8 | 16:
          return DType::kBFloat16;
        case dlpack::kFloat << 8 | 16:
          return DType::kFloat16;
        case dlpack::kFloat << 8 | 64:
          return DType::kFloat64;
        case dlpack::kFloat8E4M3FN << 8 | 8:
          return DType::kFloat8E4M3;
        case dlpack::kInt << 8 | 32:
          return DType::kInt32;
        case dlpack::kInt << 8 | 64:
          return DType::kInt64;
      }
    }
    refuse("float64, float32, bfloat16, float16, float8_e4m3fn, int32 or int64",
           "DLPack type code " + std::to_string(type.code) + " of " + std::to_string(type.bits) + " bits");
  }

  const char* op_;
  const char* name_;
  const dlpack::ExchangeApi* api_;
  void* data_ = nullptr;
  DType dtype_ = DType::kFloat32;
  bool is_cuda_ = false;
  int device_index_ = 0;
  int dim_ = 0;
  int64_t shape_[kMaxDims];
  int64_t strides_[kMaxDims];
  py::object capsule_;  // only where the type has no exchange functions
};

}  // namespace cfpp

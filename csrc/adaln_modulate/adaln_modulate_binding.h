// Binding of adaln_modulate: checks the tensors and calls the CPU kernel. On CUDA the op is a Triton kernel.
#pragma once

#include "adaln_modulate/adaln_modulate.h"
#include "common/binding.h"
#include "common/frame_rows.h"

namespace cfpp {
namespace {

void adaln_modulate(py::handle out_object, py::handle x_object, py::handle shift_object, py::handle scale_object,
                    double eps, int num_threads) {
  const auto tensor = [](const char* name, py::handle object) { return Tensor("adaln_modulate", name, object); };
  const Tensor out = tensor("out", out_object), x = tensor("x", x_object);
  const Tensor shift = tensor("shift", shift_object), scale = tensor("scale", scale_object);

  check_shape(x, {{"B", -1}, {"S", -1}, {"dim", -1}});
  check_shape(out, {{"B", x.size(0)}, {"S", x.size(1)}, {"dim", x.size(2)}});
  check_contiguous(out);
  check_frame_rows(shift, x);
  check_frame_rows(scale, x, shift.size(1));
  check_dtype(x, {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  for (const Tensor* near : {&out, &x, &shift, &scale}) {
    check_same_dtype(*near, x);
    check_device(*near, false);
    check_contiguous_rows(*near);
  }

  AdalnModulateParams p{};
  p.dtype = x.dtype();
  p.out_ptr = out.data();
  p.x_ptr = x.data();
  p.shift_ptr = shift.data();
  p.scale_ptr = scale.data();
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.frames = shift.size(1);
  p.dim = x.size(2);
  x.copy_strides(p.x_stride);
  shift.copy_strides(p.shift_stride);
  scale.copy_strides(p.scale_stride);
  p.eps = static_cast<float>(eps);
  py::gil_scoped_release release;
  adaln_modulate_cpu(p, num_threads);
}

}  // namespace

inline void register_adaln_modulate(py::module_& m) { m.def("adaln_modulate", &adaln_modulate); }

}  // namespace cfpp

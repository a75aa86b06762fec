// Binding of gated_residual: checks the tensors and calls the CPU kernel. On CUDA the op is a Triton kernel.
#pragma once

#include <optional>

#include "common/binding.h"
#include "common/frame_rows.h"
#include "gated_residual/gated_residual.h"

namespace cfpp {
namespace {

void gated_residual(py::handle sum_object, py::handle normed_object, py::handle x_object, py::handle y_object,
                    py::handle gate_object, py::handle shift_object, py::handle scale_object, double eps,
                    int num_threads) {
  const auto tensor = [](const char* name, py::handle object) { return Tensor("gated_residual", name, object); };
  const Tensor sum = tensor("sum", sum_object), normed = tensor("normed", normed_object);
  const Tensor x = tensor("x", x_object), y = tensor("y", y_object);
  const Tensor shift = tensor("shift", shift_object), scale = tensor("scale", scale_object);
  std::optional<Tensor> gate;
  if (!gate_object.is_none()) gate.emplace("gated_residual", "gate", gate_object);

  check_shape(x, {{"B", -1}, {"S", -1}, {"dim", -1}});
  for (const Tensor* like : {&sum, &normed, &y}) {
    check_shape(*like, {{"B", x.size(0)}, {"S", x.size(1)}, {"dim", x.size(2)}});
  }
  check_contiguous(sum);
  check_contiguous(normed);
  if (gate) check_frame_rows(*gate, x);
  const bool affine = shift.dim() == 1;
  if (affine) {
    check_shape(shift, {{"dim", x.size(2)}});
    check_shape(scale, {{"dim", x.size(2)}});
  } else {
    check_frame_rows(shift, x, gate ? gate->size(1) : -1);
    check_frame_rows(scale, x, shift.size(1));
  }
  check_dtype(x, {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  for (const Tensor* near : {&sum, &normed, &x, &y, &shift, &scale, gate ? &*gate : &x}) {
    check_same_dtype(*near, x);
    check_device(*near, false);
    check_contiguous_rows(*near);
  }

  GatedResidualParams p{};
  p.dtype = x.dtype();
  p.sum_ptr = sum.data();
  p.normed_ptr = normed.data();
  p.x_ptr = x.data();
  p.y_ptr = y.data();
  p.shift_ptr = shift.data();
  p.scale_ptr = scale.data();
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.frames = gate ? gate->size(1) : affine ? 1 : shift.size(1);
  p.dim = x.size(2);
  x.copy_strides(p.x_stride);
  y.copy_strides(p.y_stride);
  if (gate) {
    p.gate_ptr = gate->data();
    gate->copy_strides(p.gate_stride);
  }
  if (!affine) {  // a LayerNorm's own weight and bias keep stride 0: one row for all
    shift.copy_strides(p.shift_stride);
    scale.copy_strides(p.scale_stride);
  }
  p.scale_offset = affine ? 0.f : 1.f;
  p.eps = static_cast<float>(eps);
  py::gil_scoped_release release;
  gated_residual_cpu(p, num_threads);
}

}  // namespace

inline void register_gated_residual(py::module_& m) { m.def("gated_residual", &gated_residual); }

}  // namespace cfpp

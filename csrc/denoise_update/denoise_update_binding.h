// Binding of denoise_update: checks the tensors and calls the CPU kernel. On CUDA the op is a Triton kernel.
#pragma once

#include "common/binding.h"
#include "denoise_update/denoise_update.h"

namespace cfpp {
namespace {

void check_latents(const Tensor& tensor, const Tensor& x) {
  bool same = tensor.dim() == x.dim();
  for (int i = 0; same && i < x.dim(); ++i) same = tensor.size(i) == x.size(i);
  if (!same) tensor.refuse(x.shape_text() + " like x", tensor.shape_text());
  check_contiguous(tensor);
  check_device(tensor, false);
}

void check_levels(const Tensor& levels, const Tensor& x) {
  if (levels.dim() != 2 || (levels.size(0) != 1 && levels.size(0) != x.size(0)) || levels.size(1) != x.size(1)) {
    levels.refuse("[B=" + std::to_string(x.size(0)) + " or 1, F=" + std::to_string(x.size(1)) + "]",
                  levels.shape_text());
  }
  check_dtype(levels, DType::kFloat32);
  check_device(levels, false);
}

void denoise_update(py::handle x0_object, py::handle x_next_object, py::handle x_object, py::handle velocity_object,
                    py::handle sigma_object, py::handle noise_object, py::handle next_sigma_object, int num_threads) {
  const auto tensor = [](const char* name, py::handle object) { return Tensor("denoise_update", name, object); };
  const Tensor x0 = tensor("x0", x0_object), x = tensor("x", x_object);
  const Tensor velocity = tensor("velocity", velocity_object), sigma = tensor("sigma", sigma_object);

  if (x.dim() < 3) x.refuse("[B, F, ...]", x.shape_text());
  for (const Tensor* like : {&x, &velocity, &x0}) check_latents(*like, x);
  check_levels(sigma, x);
  check_dtype(x, DType::kFloat32);
  check_dtype(x0, DType::kFloat32);
  check_dtype(velocity, {DType::kFloat32, DType::kBFloat16, DType::kFloat16});

  DenoiseUpdateParams p{};
  p.velocity_dtype = velocity.dtype();
  p.x0_ptr = x0.data<float>();
  p.x_ptr = x.data<float>();
  p.velocity_ptr = velocity.data();
  p.sigma_ptr = sigma.data<float>();
  p.batch = x.size(0);
  p.frames = x.size(1);
  p.frame_size = 1;
  for (int i = 2; i < x.dim(); ++i) p.frame_size *= x.size(i);
  sigma.copy_strides(p.sigma_stride);
  if (!noise_object.is_none()) {
    const Tensor x_next = tensor("x_next", x_next_object), noise = tensor("noise", noise_object);
    const Tensor next_sigma = tensor("next_sigma", next_sigma_object);
    check_latents(noise, x);
    check_latents(x_next, x);
    check_dtype(noise, DType::kFloat32);
    check_dtype(x_next, DType::kFloat32);
    check_levels(next_sigma, x);
    p.x_next_ptr = x_next.data<float>();
    p.noise_ptr = noise.data<float>();
    p.next_sigma_ptr = next_sigma.data<float>();
    next_sigma.copy_strides(p.next_sigma_stride);
  }
  py::gil_scoped_release release;
  denoise_update_cpu(p, num_threads);
}

}  // namespace

inline void register_denoise_update(py::module_& m) { m.def("denoise_update", &denoise_update); }

}  // namespace cfpp

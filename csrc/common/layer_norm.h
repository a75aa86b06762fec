// LayerNorm of one row of float32 in a buffer, for CPU kernels that fuse it with the op before it. The buffer fits the
// L1 cache, so the passes over it cost arithmetic, not memory traffic.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/half.h"

namespace cfpp {

// out = (x - mean) / sqrt(variance + eps) * (scale_offset + scale) + shift, rounded once. sum: of the dim values of x.
// The variance is taken about the mean in a pass of its own: its one-pass form cancels where the mean is large.
template <typename T>
[[gnu::always_inline]] inline void layer_norm(const float* __restrict__ x, float sum, int64_t dim, float eps,
                                              float scale_offset, const T* __restrict__ scale,
                                              const T* __restrict__ shift, T* __restrict__ out) {
  const float mean = sum / static_cast<float>(dim);
  float squares = 0.f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < dim; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float inverse = 1.f / std::sqrt(squares / static_cast<float>(dim) + eps);
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) {
    out[i] = from_float<T>((x[i] - mean) * inverse * (scale_offset + to_float(scale[i])) + to_float(shift[i]));
  }
}

}  // namespace cfpp

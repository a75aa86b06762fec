// gated_residual: x + gate * y, and the LayerNorm of the sum, in one pass over memory.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/status.h"

namespace cfpp {

// Strides are in elements, 0 where one row serves the full batch or all frames; innermost dimensions are contiguous.
// B batch, S tokens, F frames of S / F tokens each.
struct GatedResidualParams {
  DType dtype;            // of every pointer
  void* sum_ptr;          // [B, S, dim], contiguous, written in full: x + gate * y
  void* normed_ptr;       // [B, S, dim], contiguous, written in full: LayerNorm(sum) * (scale_offset + scale) + shift
  const void* x_ptr;      // [B, S, dim]
  const void* y_ptr;      // [B, S, dim]
  const void* gate_ptr;   // [B, F, dim], or null for a gate of 1
  const void* shift_ptr;  // [B, F, dim]
  const void* scale_ptr;  // [B, F, dim]
  int64_t batch, tokens, frames, dim;
  int64_t x_stride[2], y_stride[2];                          // B, token
  int64_t gate_stride[2], shift_stride[2], scale_stride[2];  // B, frame
  float scale_offset;                                        // 1 for a modulation, 0 for a LayerNorm's own weight
  float eps;
};

void gated_residual_cpu(const GatedResidualParams& params, int num_threads);

}  // namespace cfpp

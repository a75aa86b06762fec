// adaln_modulate: LayerNorm over the channels without weights, then * (1 + scale) + shift, one row of both per frame.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/status.h"

namespace cfpp {

// Strides are in elements, 0 where one batch row serves all; innermost dimensions are contiguous.
// B batch, S tokens, F frames of S / F tokens each.
struct AdalnModulateParams {
  DType dtype;            // of every pointer
  void* out_ptr;          // [B, S, dim], contiguous, written in full
  const void* x_ptr;      // [B, S, dim]
  const void* shift_ptr;  // [B, F, dim]
  const void* scale_ptr;  // [B, F, dim]
  int64_t batch, tokens, frames, dim;
  int64_t x_stride[2];                       // B, token
  int64_t shift_stride[2], scale_stride[2];  // B, frame
  float eps;
};

void adaln_modulate_cpu(const AdalnModulateParams& params, int num_threads);

}  // namespace cfpp

// denoise_update: the clean estimate x0 = x - sigma * velocity, and x0 noised again to the next step's level.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/status.h"

namespace cfpp {

// B batch, F frames of `frame_size` values. All [B, F, frame_size] are contiguous.
struct DenoiseUpdateParams {
  DType velocity_dtype;
  float* x0_ptr;                // [B, F, frame_size], written in full
  float* x_next_ptr;            // likewise; null where noise is null
  const float* x_ptr;           // [B, F, frame_size]
  const void* velocity_ptr;     // [B, F, frame_size]
  const float* noise_ptr;       // [B, F, frame_size], or null after the last step
  const float* sigma_ptr;       // [B, F], noise level of x
  const float* next_sigma_ptr;  // [B, F], noise level of x_next; null where noise is null
  int64_t batch, frames, frame_size;
  int64_t sigma_stride[2], next_sigma_stride[2];  // B, frame, in elements; 0 where one row serves the full batch
};

void denoise_update_cpu(const DenoiseUpdateParams& params, int num_threads);

}  // namespace cfpp

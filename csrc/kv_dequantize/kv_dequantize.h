// kv_dequantize_: converts the visible rows of a float8 cache to the dtype that attention reads.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/status.h"

namespace cfpp {

// Pointers are device pointers for the CUDA launcher. Strides are in elements; head_dim is contiguous. B batch, H
// heads, D head_dim (even), G groups of queries, R ranges of each. A range is [first, last) in tokens, (0, 0) an unused
// one; ranges may overlap. out = code * scale, rounded to dtype and saturated at its largest number; NaN stays NaN.
// Rows that no group of their batch row sees are neither read nor written.
struct KvDequantizeParams {
  DType dtype;                 // of the outputs
  void* k_out_ptr;             // [B, H, capacity, D]
  void* v_out_ptr;             // likewise
  const uint8_t* k_cache_ptr;  // [B, H, capacity, D], codes of float8 e4m3
  const uint8_t* v_cache_ptr;  // likewise
  const float* k_scale_ptr;    // [B, H], contiguous
  const float* v_scale_ptr;    // likewise
  const int32_t* ranges_ptr;   // [B, G, R, 2], contiguous
  int64_t batch, heads, capacity, head_dim;
  int64_t groups, ranges;     // G, R
  int64_t k_out_stride[3];    // B, H, token
  int64_t v_out_stride[3];    // B, H, token
  int64_t k_cache_stride[3];  // B, H, token
  int64_t v_cache_stride[3];  // B, H, token
};

// Checks the ranges before anything is written.
Status kv_dequantize_cpu(const KvDequantizeParams& params, int num_threads);

// Enqueues on `stream` (a cudaStream_t). Ranges are read on the device, so that one captured launch serves every frame;
// what they name outside the cache is left to attention, which traps.
Status kv_dequantize_cuda(const KvDequantizeParams& params, int device, void* stream);

}  // namespace cfpp

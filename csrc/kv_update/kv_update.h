// kv_update_: RMS-norm q and k over all channels, rotate both in 3-D, write k and v into the cache, return q.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/status.h"

namespace cfpp {

// Pointers are device pointers for the CUDA launcher. Strides are in elements; innermost dimensions are contiguous.
// B batch, H heads, D head_dim (even), S = frames * rows * columns tokens, token s = (frame, row, column) row-major.
struct KvUpdateParams {
  DType dtype;                     // of every void pointer but the caches'
  DType cache_dtype;               // the same, or float8 e4m3 with x / scale, saturated
  void* k_cache_ptr;               // [B, H, capacity, D], written at tokens write_index .. + S / groups
  void* v_cache_ptr;               // likewise
  const float* k_scale_ptr;        // [B, H], contiguous, > 0; null unless the caches are float8
  const float* v_scale_ptr;        // likewise
  void* q_out_ptr;                 // [B, H, S, D], contiguous, written in full
  const void* q_ptr;               // [B, S, H * D]
  const void* k_ptr;               // [B, S, H * D]
  const void* v_ptr;               // [B, S, H * D]
  const void* q_norm_ptr;          // [H * D], RMSNorm weight
  const void* k_norm_ptr;          // [H * D]
  const float* rope_t_ptr;         // [B, frames, time_pairs, 2], (cos, sin)
  const float* rope_h_ptr;         // [rows, row_pairs, 2], contiguous
  const float* rope_w_ptr;         // [columns, column_pairs, 2], contiguous
  const int32_t* write_index_ptr;  // [B, groups], first cache token of each group
  int64_t batch, heads, head_dim, capacity;
  int64_t frames, rows, columns, groups;
  int64_t time_pairs, row_pairs, column_pairs;    // sum head_dim / 2
  int64_t k_cache_stride[3];                      // B, H, token
  int64_t v_cache_stride[3];                      // B, H, token
  int64_t q_stride[2], k_stride[2], v_stride[2];  // B, token
  int64_t rope_t_stride[2];                       // B, frame
  int64_t write_index_stride[2];                  // B, group
  float eps;

  CFPP_HOST_DEVICE int64_t channels() const { return heads * head_dim; }
  CFPP_HOST_DEVICE int64_t tokens() const { return frames * rows * columns; }
  CFPP_HOST_DEVICE int64_t tokens_per_group() const { return tokens() / groups; }
};

// Checks write_index and the scales before anything is written.
Status kv_update_cpu(const KvUpdateParams& params, int num_threads);

// Enqueues on `stream` (a cudaStream_t). A write_index out of range stops the kernel with a trap, since the value is
// known on the device only; the cache's host mirror refuses such an index before it gets here. Scales are not checked:
// one that is not a positive number makes NaN or saturated values.
Status kv_update_cuda(const KvUpdateParams& params, int device, void* stream);

}  // namespace cfpp

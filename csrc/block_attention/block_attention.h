// block_attention: softmax attention of one block of queries over token ranges of the KV cache.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/status.h"

namespace cfpp {

// Pointers are device pointers for the CUDA launcher. Strides are in elements; head_dim is contiguous in q, k and v.
// B batch, H heads, D head_dim, Sq queries = G equal groups; group g sees the union of its R ranges. A range is
// [first, last) in tokens of the cache; ranges of a group do not overlap, and (0, 0) stands for an unused one. Every
// group sees at least one token. Rows of the cache outside a group's ranges never reach its output, whatever their
// values.
struct BlockAttentionParams {
  DType dtype;                // of q, k, v and out: bfloat16 or float16, on the CPU float32 too
  const void* q_ptr;          // [B, H, Sq, D]
  const void* k_ptr;          // [B, H, capacity, D]
  const void* v_ptr;          // [B, H, capacity, D]
  void* out_ptr;              // [B, Sq, H, D], contiguous, written in full
  const int32_t* ranges_ptr;  // [B, G, R, 2], contiguous
  void* workspace_ptr;        // block_attention_workspace() bytes, 16-byte aligned; contents need not survive a call
  int64_t batch, heads, queries, head_dim, capacity;
  int64_t groups, ranges;  // G, R
  int64_t q_stride[3];     // B, H, token
  int64_t k_stride[3];     // B, H, token
  int64_t v_stride[3];     // B, H, token
  float scale;             // of the logits

  CFPP_HOST_DEVICE int64_t queries_per_group() const { return queries / groups; }
};

// Checks the ranges before anything is written. Needs no workspace.
Status block_attention_cpu(const BlockAttentionParams& params, int num_threads);

// Enqueues on `stream` (a cudaStream_t). Ranges are read on the device, so that one captured launch serves every frame;
// one out of [0, capacity], or a group that sees nothing, stops the kernel with a trap: the host's copy of the ranges
// is checked before the call.
Status block_attention_cuda(const BlockAttentionParams& params, int device, void* stream);

// Returns in `bytes` the workspace that the launch of these params needs on `device`, often 0. Pointers are not read.
Status block_attention_workspace(const BlockAttentionParams& params, int device, int64_t* bytes);

}  // namespace cfpp

// The partial result of a piece: its place in the workspace and the meaning of its numbers.
#pragma once

#include "block_attention/block_attention.h"
#include "block_attention/plan.h"

namespace cfpp {

// Partial result of one piece, in the workspace. All plan.tile_rows rows are the piece's to write; rows past the group
// are never read.
struct PartialResult {
  float* out;  // [tile_rows, head_dim]: sum over keys of 2^(logit - max) * v
  float* max;  // [tile_rows]: the largest logit, in base 2 (q.k * scale * log2 e); -inf for a piece without keys
  float* sum;  // [tile_rows]: sum over keys of 2^(logit - max)
};

CFPP_HOST_DEVICE inline PartialResult partial_result(const BlockAttentionParams& params, const AttentionPlan& plan,
                                                     int slot) {
  float* out = static_cast<float*>(params.workspace_ptr) + slot * plan.slot_floats(static_cast<int>(params.head_dim));
  float* max = out + plan.tile_rows * params.head_dim;
  return {out, max, max + plan.tile_rows};
}

}  // namespace cfpp

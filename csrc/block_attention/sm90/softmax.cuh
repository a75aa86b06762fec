// Online softmax on the registers of a wgmma accumulator. A thread has two rows of the warpgroup's 64, register i
// belonging to row i / 2 % 2, and four adjacent lanes share a row; kKeys / 2 registers are its part of a tile.
#pragma once

#include "block_attention/sm90/shared.cuh"

namespace cfpp {
namespace sm90 {

__device__ __forceinline__ constexpr int row_of(int i) { return i / 2 % 2; }

// Sets the masked columns to -infinity. This is a select, not an addition, because the masked logits may be NaN.
__device__ __forceinline__ void mask(float (&logits)[kKeys / 2], const KvTile& tile) {
  const int lane_column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) {
    const int column = 8 * (i / 4) + i % 2 + lane_column;
    logits[i] = column >= tile.begin && column < tile.end ? logits[i] : -INFINITY;
  }
}

struct Softmax {
  float scale;                            // of the logits, in base 2
  float max[2] = {-INFINITY, -INFINITY};  // of the raw logits or less, by kMaxLag at most; the same in the four lanes
  float sum[2] = {0.f, 0.f};              // of this lane's columns only: total() adds up the four

  // Turns logits into probabilities relative to the running maximum. Returns true, in all lanes of a warp, if results
  // of earlier tiles must be multiplied by `rescale`; otherwise all its factors are 1. A tile has at least one column
  // that is not masked, so the maximum is never -infinity.
  __device__ __forceinline__ bool update(float (&x)[kKeys / 2], float (&rescale)[2]) {
    float best[2] = {max[0], max[1]}, shift[2];
    bool grew = false;
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) best[row_of(i)] = fmaxf(best[row_of(i)], x[i]);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      best[row] = fmaxf(best[row], __shfl_xor_sync(0xffffffffu, best[row], 1));
      best[row] = fmaxf(best[row], __shfl_xor_sync(0xffffffffu, best[row], 2));
      const bool grows = (best[row] - max[row]) * scale > kMaxLag;
      if (!grows) best[row] = max[row];
      grew |= grows;
      rescale[row] = exp2_approx((max[row] - best[row]) * scale);
      max[row] = best[row];
      shift[row] = -best[row] * scale;
      sum[row] *= rescale[row];
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      x[i] = exp2_approx(fmaf(x[i], scale, shift[row_of(i)]));
      sum[row_of(i)] += x[i];
    }
    return __any_sync(0xffffffffu, grew);
  }

  __device__ __forceinline__ float total(int row) const {
    const float pair = sum[row] + __shfl_xor_sync(0xffffffffu, sum[row], 1);
    return pair + __shfl_xor_sync(0xffffffffu, pair, 2);
  }
};

}  // namespace sm90
}  // namespace cfpp

// Online softmax over the accumulators of mma.sync. A thread has rows g and g + 8 of each of its kRowTiles tiles of 16
// rows, and the four threads of a quad share them. Logits are taken in base 2: x = q.k * scale * log2 e.
#pragma once

#include "common/device.cuh"
#include "common/ptx.cuh"

namespace cfpp {

// The largest value of the four threads that share a row, and the sum of their values.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Sets the logits of keys from `end` on to -infinity. This is a select, so their products may have any value.
template <int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void mask_keys(float (&logits)[kRowTiles][kKeyTiles][4], int end, int lane) {
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool counts = 8 * n + 2 * (lane % 4) + (i & 1) < end;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) logits[m][n][i] = counts ? logits[m][n][i] : -INFINITY;
    }
  }
}

template <int kRowTiles>
struct OnlineSoftmax {
  float max[kRowTiles][2];  // of the row, in base 2
  float sum[kRowTiles][2];  // of this thread's keys only

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      max[m][0] = max[m][1] = -INFINITY;
      sum[m][0] = sum[m][1] = 0.f;
    }
  }

  // Turns q.k into weights 2^(x - max). Rescales out and sum if the maximum grows.
  template <int kKeyTiles, int kOutTiles>
  __device__ __forceinline__ void step(float (&logits)[kRowTiles][kKeyTiles][4], float (&out)[kRowTiles][kOutTiles][4],
                                       float scale_log2) {
    float larger[kRowTiles][2];
    bool moves = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = logits[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) x = fmaxf(x, fmaxf(logits[m][n][2 * half], logits[m][n][2 * half + 1]));
        larger[m][half] = fmaxf(max[m][half], quad_max(x) * scale_log2);
        moves = moves || larger[m][half] > max[m][half] + kMaxLag;
      }
    }
    if (__any_sync(0xffffffffu, moves)) rescale(larger, out);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          logits[m][n][i] = exp2_approx(fmaf(logits[m][n][i], scale_log2, -max[m][i / 2]));
          sum[m][i / 2] += logits[m][n][i];
        }
      }
    }
  }

 private:
  template <int kOutTiles>
  __device__ __forceinline__ void rescale(const float (&larger)[kRowTiles][2], float (&out)[kRowTiles][kOutTiles][4]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = exp2_approx(max[m][half] - larger[m][half]);
        max[m][half] = larger[m][half];
        sum[m][half] *= factor;
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n) {
          out[m][n][2 * half] *= factor;
          out[m][n][2 * half + 1] *= factor;
        }
      }
    }
  }
};

}  // namespace cfpp

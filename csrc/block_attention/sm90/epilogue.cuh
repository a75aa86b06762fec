// Writes a consumer's registers to global memory: the finished rows of a tile, or the partial result of a piece.
#pragma once

#include "block_attention/sm90/softmax.cuh"

namespace cfpp {
namespace sm90 {

// x[i] of lane j of four adjacent lanes becomes x[j] of lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + bit], bit);
      (upper ? x[i] : x[i + bit]) = got;
    }
  }
}

// Rows `first_row` to first_row + 63 of the item's tile, as far as they are queries of its group. A lane has two
// adjacent columns of every 8, so four lanes trade places and each writes 16 bytes.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store(const BlockAttentionParams& p, const AttentionPlan& plan, const WorkItem& item,
                                      int first_row, const float (&out)[kHeadDim / 2], const Softmax& softmax) {
  const int queries = queries_per_group(p), thread = threadIdx.x % kWarpgroup, lane = thread % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + thread / kWarpSize * 16 + thread % kWarpSize / 4 + 8 * half;
    const bool live = item.row + row < queries;
    const float sum = softmax.total(half);
    if (item.slot >= 0) {
      const PartialResult partial = partial_result(p, plan, item.slot);
      if (!live) continue;
      float* to = partial.out + row * kHeadDim + 2 * lane;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        *reinterpret_cast<float2*>(to + 8 * i) = make_float2(out[4 * i + 2 * half], out[4 * i + 2 * half + 1]);
      }
      if (lane == 0) {
        partial.max[row] = softmax.max[half] * softmax.scale;
        partial.sum[row] = sum;
      }
      continue;
    }
    const float inverse = __fdividef(1.f, sum);
    const int64_t query = item.group * static_cast<int64_t>(queries) + item.row + row;
    T* to = static_cast<T*>(p.out_ptr) + ((item.batch * p.queries + query) * p.heads + item.head) * kHeadDim + 8 * lane;
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* pair = out + 4 * (4 * i + j) + 2 * half;
        x[j] = pack_2<T>(pair[0] * inverse, pair[1] * inverse);
      }
      transpose_quad(x);
      if (live) *reinterpret_cast<uint4*>(to + 32 * i) = make_uint4(x[0], x[1], x[2], x[3]);
    }
  }
}

}  // namespace sm90
}  // namespace cfpp

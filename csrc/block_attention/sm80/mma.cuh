// The two matrix products of attention on mma.sync, and the layout of the shared memory that they read. A tile is
// [rows][D] of 16-bit elements without padding. The 16-byte chunk c of a row is stored at c ^ (row % 8), so that
// neither cp.async, which writes rows, nor ldmatrix, which reads 8 rows of one chunk, has bank conflicts.
#pragma once

#include "common/ptx.cuh"

namespace cfpp {

constexpr int kChunk = 8;  // elements of 16 bytes

template <int kHeadDim>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return static_cast<uint32_t>(2 * (row * kHeadDim + kChunk * (chunk ^ (row & 7))));
}

// Starts to copy kRows rows into a tile; rows from `valid` >= 1 on become zeros. `stride` is in elements.
template <int kHeadDim, int kRows, int kThreads, typename T>
__device__ __forceinline__ void load_rows(uint32_t tile, const T* from, int64_t stride, int valid) {
  constexpr int kChunks = kHeadDim / kChunk, kRowsAtOnce = kThreads / kChunks;
  const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
#pragma unroll
  for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
    const int row = first + i * kRowsAtOnce;
    const bool inside = row < valid;  // a copy of 0 bytes needs a valid address too
    cp_async_16(tile + chunk_offset<kHeadDim>(row, chunk), from + (inside ? row : 0) * stride + chunk * kChunk,
                inside ? 16 : 0);
  }
}

// Returns the lane's address for ldmatrix_x4 of a 16x16 block whose four 8x8 matrices go down first, then right (Q and
// V), or right first, then down (K). The block `columns16` further right is at address ^ (32 * columns16), for the
// swizzle is an xor; the one 16 rows down is at address + 32 * kHeadDim.
template <int kHeadDim>
__device__ __forceinline__ uint32_t down_then_right(uint32_t tile, int lane) {
  return tile + chunk_offset<kHeadDim>(lane & 15, lane >> 4);
}
template <int kHeadDim>
__device__ __forceinline__ uint32_t right_then_down(uint32_t tile, int lane) {
  return tile + chunk_offset<kHeadDim>((lane & 7) + 8 * (lane >> 4), (lane >> 3) & 1);
}

// logits = Q K^T for 16 * kRowTiles rows of Q and 8 * kKeyTiles rows of K. Both addresses are the lane's.
template <int kHeadDim, typename T, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void multiply_qk(float (&logits)[kRowTiles][kKeyTiles][4], uint32_t q, uint32_t k) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) logits[m][n][0] = logits[m][n][1] = logits[m][n][2] = logits[m][n][3] = 0.f;
  }
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) ldmatrix_x4(a[m], (q ^ (32 * step)) + 32 * kHeadDim * m);
#pragma unroll
    for (int n = 0; n < kKeyTiles; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, (k ^ (32 * step)) + 16 * kHeadDim * n);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma_16816<T>(logits[m][n], a[m], b[0], b[1]);
        mma_16816<T>(logits[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// out += P V for 8 * kKeyTiles rows of V. P is passed as accumulators of multiply_qk: rounded in pairs, the
// accumulators of two key tiles are the A operand without any exchange between threads.
template <int kHeadDim, typename T, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void multiply_pv(float (&out)[kRowTiles][kHeadDim / 8][4],
                                            const float (&p)[kRowTiles][kKeyTiles][4], uint32_t v) {
#pragma unroll
  for (int step = 0; step < kKeyTiles / 2; ++step) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const float* left = p[m][2 * step];
      const float* right = p[m][2 * step + 1];
      a[m][0] = pack_2<T>(left[0], left[1]);
      a[m][1] = pack_2<T>(left[2], left[3]);
      a[m][2] = pack_2<T>(right[0], right[1]);
      a[m][3] = pack_2<T>(right[2], right[3]);
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, (v ^ (16 * n)) + 32 * kHeadDim * step);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma_16816<T>(out[m][n], a[m], b[0], b[1]);
        mma_16816<T>(out[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace cfpp

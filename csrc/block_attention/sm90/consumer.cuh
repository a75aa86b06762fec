// The consumers of the Hopper kernel: two warpgroups, 64 queries each, with everything but Q, K and V in registers.
//
//   tensor cores   QK_0 |           | QK_1 | PV_0      | QK_2 | PV_1      | ...
//   this group          | softmax_0 |      | softmax_1 |      | softmax_2 | ...
//
// wgmma runs on its own, so softmax_j works while PV_{j-1} is under way, and the other warpgroup's products fill what
// is left. Nothing makes the two issue alternately: barriers for it cost 1 % more than they gained (H200).
#pragma once

#include "block_attention/sm90/epilogue.cuh"
#include "block_attention/sm90/softmax.cuh"

namespace cfpp {
namespace sm90 {

// One arrival of this warp.
__device__ __forceinline__ void release(Barrier& empty) {
  if (threadIdx.x % kWarpSize == 0) barrier_arrive(empty);
}

template <typename T, int kHeadDim>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(int consumer, Shared<kHeadDim>& shared, const BlockAttentionParams& p,
                                      const AttentionPlan& plan)
      : shared_(shared), p_(p), plan_(plan), first_row_(consumer * kGroupRows) {}

  __device__ __forceinline__ void run() {
    for (int index = blockIdx.x; index < plan_.items(); index += plan_.ctas) {
      const WorkItem item = plan_.item(index);
      KeyWalk keys(p_, item);
      float out[kHeadDim / 2];
      Softmax softmax{p_.scale * kLog2E};
      if (keys.tiles > 0) {
        attend(keys, out, softmax);
      } else {
#pragma unroll
        for (float& value : out) value = 0.f;
      }
      store<T, kHeadDim>(p_, plan_, item, first_row_, out, softmax);
    }
  }

 private:
  __device__ __forceinline__ void attend(KeyWalk& keys, float (&out)[kHeadDim / 2], Softmax& softmax) {
    float logits[kKeys / 2], rescale[2];
    uint32_t probabilities[kKeys / kMmaDepth][4];
    barrier_wait(shared_.q_full, q_parity_);
    q_parity_ ^= 1;

    KvTile tile = keys.walker.next(), next{};
    if (keys.tiles > 1) next = keys.walker.next();
    barrier_wait(shared_.k_full[k_.stage], k_.parity);
    pin(logits);
    wgmma_fence();
    start_logits(logits);
    wgmma_wait<0>();
    pin(logits);
    release_k(keys.tiles == 1);
    if (tile.begin > 0 || tile.end < kKeys) mask(logits, tile);
    softmax.update(logits, rescale);
    pack(logits, probabilities);

    for (int i = 1; i < keys.tiles; ++i) {
      clear_foreign_values(tile);
      barrier_wait(shared_.k_full[k_.stage], k_.parity);
      pin(logits);
      wgmma_fence();
      start_logits(logits);
      barrier_wait(shared_.v_full[v_.stage], v_.parity);
      start_out(out, probabilities, i > 1);
      wgmma_wait<1>();
      pin(logits);
      release_k(i == keys.tiles - 1);
      tile = next;
      if (tile.begin > 0 || tile.end < kKeys) mask(logits, tile);
      const bool grew = softmax.update(logits, rescale);
      pin(logits);
      // The branches of next(), here, also keep ptxas from moving finish_out's wait up in front of the softmax, which
      // is to run during PV; straight-line code it does reorder so.
      if (i + 1 < keys.tiles) next = keys.walker.next();
      finish_out(out, probabilities);
      if (grew) {
#pragma unroll
        for (int j = 0; j < kHeadDim / 2; ++j) out[j] *= rescale[row_of(j)];
      }
      pack(logits, probabilities);
    }

    clear_foreign_values(tile);
    barrier_wait(shared_.v_full[v_.stage], v_.parity);
    start_out(out, probabilities, keys.tiles > 1);
    finish_out(out, probabilities);
  }

  // logits = Q K^T
  __device__ __forceinline__ void start_logits(float (&logits)[kKeys / 2]) {
    const uint64_t q = matrix_descriptor(shared_address(shared_.q) + first_row_ * kSlabRowBytes, 0);
    const uint64_t k = matrix_descriptor(shared_address(shared_.k[k_.stage]), 0);
#pragma unroll
    for (int step = 0; step < kHeadDim / kMmaDepth; ++step) {
      wgmma<T>(logits, advance(q, k_major_step(step, kRows)), advance(k, k_major_step(step, kKeys)), step > 0);
    }
    wgmma_commit();
  }

  // out = P V, plus out if `accumulate`
  __device__ __forceinline__ void start_out(float (&out)[kHeadDim / 2], uint32_t (&probabilities)[kKeys / kMmaDepth][4],
                                            bool accumulate) {
    const uint64_t v = matrix_descriptor(shared_address(shared_.v[v_.stage]), kKeys * kSlabRowBytes);
    pin(out);
    pin(probabilities);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kKeys / kMmaDepth; ++step) {
      wgmma<T>(out, probabilities[step], advance(v, mn_major_step(step)), accumulate || step > 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void finish_out(float (&out)[kHeadDim / 2],
                                             uint32_t (&probabilities)[kKeys / kMmaDepth][4]) {
    wgmma_wait<0>();
    pin(out);
    pin(probabilities);
    release(shared_.v_empty[v_.stage]);
    v_.advance();
  }

  __device__ __forceinline__ void release_k(bool last_of_item) {
    release(shared_.k_empty[k_.stage]);
    k_.advance();
    if (last_of_item) release(shared_.q_empty);
  }

  // The accumulator's registers 8 i to 8 i + 7 are the A operand of k-step i, in pairs.
  __device__ __forceinline__ static void pack(const float (&logits)[kKeys / 2],
                                              uint32_t (&probabilities)[kKeys / kMmaDepth][4]) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) probabilities[i / 4][i % 4] = pack_2<T>(logits[2 * i], logits[2 * i + 1]);
  }

  // Rows of V behind the end of a range shorter than a tile belong to others: their probability is 0, but 0 * NaN is
  // not. Both consumers clear, then both multiply.
  __device__ __forceinline__ void clear_foreign_values(const KvTile& tile) {
    if (tile.end == kKeys) return;
    barrier_wait(shared_.v_full[v_.stage], v_.parity);
    const int first = tile.end * kSlabRowBytes / 16, past = kKeys * kSlabRowBytes / 16;  // 16-byte chunks of a slab
    for (int slab = 0; slab < kHeadDim / kSlabColumns; ++slab) {
      uint4* chunks = reinterpret_cast<uint4*>(shared_.v[v_.stage]) + slab * past;
      for (int i = first + threadIdx.x - kWarpgroup; i < past; i += kConsumers * kWarpgroup) {
        chunks[i] = make_uint4(0, 0, 0, 0);
      }
    }
    async_proxy_fence();
    named_barrier_sync<kConsumerBarrier, kConsumers * kWarpgroup>();
  }

  Shared<kHeadDim>& shared_;
  const BlockAttentionParams& p_;
  const AttentionPlan& plan_;
  const int first_row_;  // of this consumer, within the tile
  Cursor<Shared<kHeadDim>::kDepth> k_, v_;
  int q_parity_ = 0;
};

}  // namespace sm90
}  // namespace cfpp

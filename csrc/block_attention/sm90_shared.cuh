// What the two roles of the Hopper kernel share: tile sizes, shared memory, and the walk over work items.
#pragma once

#include "block_attention/block_attention.h"
#include "block_attention/combine.cuh"
#include "block_attention/descriptor.h"
#include "block_attention/plan.h"
#include "block_attention/ranges.h"
#include "common/device.cuh"
#include "common/hopper.cuh"

namespace cfpp {
namespace sm90 {

// One producer warpgroup and two consumers, each of which owns 64 of the tile's queries. 176 keys: 9 tiles of them are
// one frame of 1560 tokens with 1.5 % to spare, and 176 is near the widest whose logits, probabilities and output fit
// in the registers of two consumers. ptxas reserves 168 registers per thread for 384 threads; the producer gives up
// most of its own.
constexpr int kWarpgroup = 128, kConsumers = 2, kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kGroupRows = 64, kRows = kConsumers * kGroupRows, kKeys = 176;
constexpr int kStages(int head_dim) { return head_dim == 128 ? 2 : 4; }  // what fits in 227 KiB

constexpr int kConsumerBarrier = 1;  // a named barrier; 0 is __syncthreads()

// full: TMA has delivered. empty: every warp of both consumers is done with it; one arrival a warp, so that nothing is
// assumed about warps of one warpgroup running in step.
template <int kHeadDim>
struct Shared {
  static constexpr int kDepth = kStages(kHeadDim), kRowBytes = 2 * kHeadDim;
  alignas(kSwizzleBytes) unsigned char q[kRows * kRowBytes];
  alignas(kSwizzleBytes) unsigned char k[kDepth][kKeys * kRowBytes];
  alignas(kSwizzleBytes) unsigned char v[kDepth][kKeys * kRowBytes];
  Barrier q_full, q_empty;
  Barrier k_full[kDepth], k_empty[kDepth];
  Barrier v_full[kDepth], v_empty[kDepth];

  __device__ static Shared& get() {
    unsigned char* start = dynamic_shared();
    return *reinterpret_cast<Shared*>(start + (kSwizzleBytes - shared_address(start) % kSwizzleBytes) % kSwizzleBytes);
  }
  static constexpr int bytes() { return static_cast<int>(sizeof(Shared)) + kSwizzleBytes; }

  // By one thread, before any other looks.
  __device__ void init() {
    constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarpSize;
    barrier_init(q_full, 1);
    barrier_init(q_empty, kConsumerWarps);
    for (int stage = 0; stage < kDepth; ++stage) {
      barrier_init(k_full[stage], 1);
      barrier_init(v_full[stage], 1);
      barrier_init(k_empty[stage], kConsumerWarps);
      barrier_init(v_empty[stage], kConsumerWarps);
    }
    barrier_init_fence();
  }
};

// Place in a ring of stages. It runs on from item to item; the parity tells one round from the next.
template <int kDepth>
struct Cursor {
  int stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kDepth) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ __forceinline__ const int32_t* ranges_of(const BlockAttentionParams& p, const WorkItem& item) {
  return p.ranges_ptr + 2 * static_cast<int>(p.ranges) * (item.batch * static_cast<int>(p.groups) + item.group);
}

// 32-bit: a 64-bit division costs more registers than the producer has.
__device__ __forceinline__ int queries_per_group(const BlockAttentionParams& p) {
  return static_cast<int>(p.queries) / static_cast<int>(p.groups);
}

// The keys of one item: `tiles` more tiles from walker.next(). Producer and consumers walk the same, and all of them
// skip an item without tiles, which a split tile has where there are fewer KV tiles than pieces.
struct KeyWalk {
  RangeWalker walker;
  int tiles;

  __device__ __forceinline__ KeyWalk(const BlockAttentionParams& p, const WorkItem& item)
      : walker(ranges_of(p, item), static_cast<int>(p.ranges), kKeys, Tail::kShift) {
    // What item.first_kv_tile() and last_kv_tile() say, in 32 bits; see above.
    const int all = walker.tiles(), first = all * item.piece / item.splits;
    tiles = all * (item.piece + 1) / item.splits - first;
    walker.seek(first);
  }
};

}  // namespace sm90
}  // namespace cfpp

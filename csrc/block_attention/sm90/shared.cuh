// What producer and consumers of the Hopper kernel share: shared memory and the walk over work items.
#pragma once

#include "block_attention/block_attention.h"
#include "block_attention/combine.cuh"
#include "block_attention/plan.h"
#include "block_attention/sm90/config.h"
#include "block_attention/sm90/descriptor.h"
#include "common/device.cuh"
#include "common/hopper.cuh"
#include "common/token_ranges.cuh"

namespace cfpp {
namespace sm90 {

// full: TMA has delivered. empty: every warp of both consumers is done with it; one arrival a warp, so that nothing is
// assumed about warps of one warpgroup running in step.
template <int kHeadDim>
struct Shared {
  static constexpr int kDepth = stages_of(kHeadDim), kRowBytes = 2 * kHeadDim;
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

  // Called by one thread, before any other reads a barrier.
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

// Position in a ring of stages, kept from item to item. The parity distinguishes one round from the next.
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
    // item.first_kv_tile() and last_kv_tile() in 32 bits; see queries_per_group().
    const int all = walker.tiles(), first = all * item.piece / item.splits;
    tiles = all * (item.piece + 1) / item.splits - first;
    walker.seek(first);
  }
};

}  // namespace sm90
}  // namespace cfpp

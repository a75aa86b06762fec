// The producer of the Hopper kernel: one thread that keeps TMA busy.
#pragma once

#include "block_attention/sm90/shared.cuh"

namespace cfpp {
namespace sm90 {

// Stops the kernel at a range that does not fit, and for a group without keys.
__device__ __forceinline__ void check_ranges(const BlockAttentionParams& p, const WorkItem& item) {
  const int32_t* ranges = ranges_of(p, item);
  bool sees_any = false;
  for (int i = 0; i < 2 * static_cast<int>(p.ranges); i += 2) {
    check_range(ranges[i], ranges[i + 1], p.capacity);
    sees_any |= ranges[i] < ranges[i + 1];
  }
  if (!sees_any) __trap();
}

// Loads in the order of use: K of a tile comes before V of the tile before it. Q goes behind the first K, for which a
// stage is often free while the consumers still work on the Q of the item before.
template <int kHeadDim>
__device__ __forceinline__ void produce(Shared<kHeadDim>& shared, const TensorMap& q_map, const TensorMap& k_map,
                                        const TensorMap& v_map, const BlockAttentionParams& p,
                                        const AttentionPlan& plan) {
  tma_prefetch_map(q_map);
  tma_prefetch_map(k_map);
  tma_prefetch_map(v_map);
  Cursor<Shared<kHeadDim>::kDepth> k, v;
  int q_parity = 0;
  for (int index = blockIdx.x; index < plan.items(); index += plan.ctas) {
    const WorkItem item = plan.item(index);
    check_ranges(p, item);
    KeyWalk keys(p, item);
    int v_row = 0;
    for (int tile = 0; tile <= keys.tiles && keys.tiles > 0; ++tile) {
      int k_row = 0;
      if (tile < keys.tiles) {
        k_row = keys.walker.next().row;
        barrier_wait(shared.k_empty[k.stage], k.parity ^ 1);
        barrier_arrive_expecting(shared.k_full[k.stage], sizeof(shared.k[0]));
        tma_load(shared.k[k.stage], k_map, shared.k_full[k.stage], 0, k_row, 0, item.head, item.batch, kEvictLast);
        k.advance();
      }
      if (tile == 0) {
        const int row = item.group * queries_per_group(p) + item.row;
        barrier_wait(shared.q_empty, q_parity ^ 1);
        barrier_arrive_expecting(shared.q_full, sizeof(shared.q));
        tma_load(shared.q, q_map, shared.q_full, 0, row, 0, item.head, item.batch, kEvictFirst);
        q_parity ^= 1;
      } else {
        barrier_wait(shared.v_empty[v.stage], v.parity ^ 1);
        barrier_arrive_expecting(shared.v_full[v.stage], sizeof(shared.v[0]));
        tma_load(shared.v[v.stage], v_map, shared.v_full[v.stage], 0, v_row, 0, item.head, item.batch, kEvictLast);
        v.advance();
      }
      v_row = k_row;
    }
  }
}

}  // namespace sm90
}  // namespace cfpp

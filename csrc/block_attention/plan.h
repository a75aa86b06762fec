// The assignment of work to CTAs. At one frame of 1560 tokens and 12 heads a plain grid of 128-row tiles is 156 CTAs on
// 132 SMs: a full wave and a nearly empty one. Instead a persistent grid of one CTA per slot takes floor(tiles / ctas)
// whole tiles each, and only the tiles left over are split over their keys into `splits` pieces, whose partial results
// a second kernel merges in a fixed order: no atomics, so two runs give the same bits. Whole tiles go in head-major
// order, so that CTAs that run together read the same keys from L2; an even split of all work (stream-K) would lose
// that. The plan depends on sizes only, never on the ranges, so a captured launch stays valid.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace cfpp {

// One piece of a query tile: keys [piece * n / splits, (piece + 1) * n / splits) of its n KV tiles. Whole tiles have
// splits == 1. slot: where a partial result goes, in pieces; -1 for a whole tile.
struct WorkItem {
  int batch, head, group;
  int row;  // first query of the tile, within the group
  int piece, splits, slot;

  CFPP_HOST_DEVICE int first_kv_tile(int kv_tiles) const {
    return static_cast<int>(static_cast<int64_t>(kv_tiles) * piece / splits);
  }
  CFPP_HOST_DEVICE int last_kv_tile(int kv_tiles) const {
    return static_cast<int>(static_cast<int64_t>(kv_tiles) * (piece + 1) / splits);
  }
};

struct AttentionPlan {
  int batch, heads, groups;
  int tile_rows;        // queries of a tile
  int tiles_per_group;  // query tiles of one group of one head
  int ctas;             // of the persistent grid
  int splits;           // of each remainder tile; 1: none is split

  CFPP_HOST_DEVICE int tiles() const { return batch * heads * groups * tiles_per_group; }
  CFPP_HOST_DEVICE int whole_tiles() const { return splits == 1 ? tiles() : tiles() / ctas * ctas; }
  CFPP_HOST_DEVICE int split_tiles() const { return tiles() - whole_tiles(); }
  CFPP_HOST_DEVICE int pieces() const { return split_tiles() * splits; }
  CFPP_HOST_DEVICE int items() const { return whole_tiles() + pieces(); }

  // CTA c takes items c, c + ctas, c + 2 * ctas, ... < items().
  CFPP_HOST_DEVICE WorkItem item(int index) const {
    const int whole = whole_tiles(), split = split_tiles();
    if (index < whole) return locate(index, 0, 1, -1);
    const int piece = (index - whole) / split, tile = (index - whole) % split;  // chunk-major: neighbours share keys
    return locate(whole + tile, piece, splits, tile * splits + piece);
  }

  // Split tile number `index`, all pieces together: where its merged result goes.
  CFPP_HOST_DEVICE WorkItem split_tile(int index) const {
    return locate(whole_tiles() + index, 0, splits, index * splits);
  }

  // Partial results: tile_rows x head_dim unnormalised outputs, then tile_rows maxima, then tile_rows sums, per piece.
  CFPP_HOST_DEVICE int64_t slot_floats(int head_dim) const { return static_cast<int64_t>(tile_rows) * (head_dim + 2); }
  CFPP_HOST_DEVICE int64_t workspace_bytes(int head_dim) const { return 4 * pieces() * slot_floats(head_dim); }

 private:
  CFPP_HOST_DEVICE WorkItem locate(int tile, int piece, int pieces_of_tile, int slot) const {
    const int m = tile % tiles_per_group, group = tile / tiles_per_group % groups;
    const int flat_head = tile / (tiles_per_group * groups);
    return {flat_head / heads, flat_head % heads, group, m * tile_rows, piece, pieces_of_tile, slot};
  }
};

// The number of pieces per remainder tile that leaves the least idle time: waves of pieces, each 1 / splits of a tile
// long, plus the cost of writing and merging one more partial result, `kPieceCost` of a whole tile.
inline int choose_splits(int tiles, int ctas, int max_splits) {
  constexpr double kPieceCost = 0.004;
  const int rest = tiles % ctas;
  if (rest == 0) return 1;
  int best = 1;
  double least = 1.0;
  for (int splits = 2; splits <= max_splits; ++splits) {
    const int64_t waves = (static_cast<int64_t>(rest) * splits + ctas - 1) / ctas;
    const double time = static_cast<double>(waves) / splits + kPieceCost * splits;
    if (time < least) {
      least = time;
      best = splits;
    }
  }
  return best;
}

inline AttentionPlan make_plan(int64_t batch, int64_t heads, int64_t groups, int64_t queries_per_group, int tile_rows,
                               int ctas, int max_splits) {
  AttentionPlan plan{};
  plan.batch = static_cast<int>(batch);
  plan.heads = static_cast<int>(heads);
  plan.groups = static_cast<int>(groups);
  plan.tile_rows = tile_rows;
  plan.tiles_per_group = static_cast<int>((queries_per_group + tile_rows - 1) / tile_rows);
  plan.ctas = ctas;
  plan.splits = choose_splits(plan.tiles(), ctas, max_splits);
  return plan;
}

}  // namespace cfpp

// plan.h: for random sizes, grids and splits the CTAs together compute every tile of keys of every query tile once, and
// every piece has a workspace slot of its own, where the merge reads it.
#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "block_attention/plan.h"
#include "csrc/check.h"

using cfpp::AttentionPlan;
using cfpp::WorkItem;

using Tile = std::tuple<int, int, int, int>;  // batch, head, group, row

Tile tile_of(const WorkItem& item) { return {item.batch, item.head, item.group, item.row}; }

void check_plan(const AttentionPlan& plan, int queries_per_group, std::mt19937& random) {
  const std::string context = "tiles " + std::to_string(plan.tiles()) + " ctas " + std::to_string(plan.ctas) +
                              " splits " + std::to_string(plan.splits);
  std::map<int, int> kv_tiles;  // per group, at least one
  for (int g = 0; g < plan.groups; ++g) kv_tiles[g] = 1 + static_cast<int>(random() % 40);
  std::map<Tile, std::vector<int>> done;
  std::map<int, WorkItem> slots;
  int least = plan.items(), most = 0;
  for (int cta = 0; cta < plan.ctas; ++cta) {
    int whole = 0;
    for (int index = cta; index < plan.items(); index += plan.ctas) {
      const WorkItem item = plan.item(index);
      const int n = kv_tiles[item.group];
      auto& covered = done[tile_of(item)];
      covered.resize(n);
      for (int t = item.first_kv_tile(n); t < item.last_kv_tile(n); ++t) ++covered.at(t);
      CHECK(item.row >= 0 && item.row < queries_per_group && item.row % plan.tile_rows == 0, context);
      CHECK((item.slot < 0) == (item.splits == 1), context);
      if (item.slot < 0) {
        ++whole;
      } else {
        CHECK(slots.emplace(item.slot, item).second, context);
        CHECK(item.slot < plan.pieces(), context);
      }
    }
    least = std::min(least, whole);
    most = std::max(most, whole);
  }
  if (plan.splits > 1) CHECK(least == most, context);  // full waves
  const int tiles_per_group = (queries_per_group + plan.tile_rows - 1) / plan.tile_rows;
  CHECK(static_cast<int>(done.size()) == plan.batch * plan.heads * plan.groups * tiles_per_group, context);
  for (const auto& [tile, covered] : done) {
    for (const int times : covered) CHECK(times == 1, context);
  }
  CHECK(static_cast<int>(slots.size()) == plan.pieces(), context);
  for (int i = 0; i < plan.split_tiles(); ++i) {
    const WorkItem merged = plan.split_tile(i);
    for (int s = 0; s < merged.splits; ++s) {
      const WorkItem& piece = slots.at(merged.slot + s);
      CHECK(tile_of(piece) == tile_of(merged) && piece.piece == s, context);
    }
  }
  CHECK(plan.workspace_bytes(64) == 4 * plan.pieces() * plan.slot_floats(64), context);
}

int main() {
  std::mt19937 random(3);
  const auto from_1_to = [&](int n) { return 1 + static_cast<int>(random() % n); };
  for (int i = 0; i < 3000; ++i) {
    const int queries = from_1_to(700), tile_rows = from_1_to(2) * 64;
    const int batch = from_1_to(3), heads = from_1_to(14), groups = from_1_to(2), ctas = from_1_to(140);
    AttentionPlan plan = cfpp::make_plan(batch, heads, groups, queries, tile_rows, ctas, from_1_to(12));
    check_plan(plan, queries, random);
    plan.splits = from_1_to(12);  // any number must do
    check_plan(plan, queries, random);
  }
  // One frame of 1560 tokens and 12 heads on 132 SMs: one full wave, 24 tiles left over, which fill one wave in 5
  // pieces.
  const AttentionPlan plan = cfpp::make_plan(1, 12, 1, 1560, 128, 132, 8);
  CHECK(plan.whole_tiles() == 132 && plan.split_tiles() == 24 && plan.splits == 5, "1560 tokens, 12 heads");
}

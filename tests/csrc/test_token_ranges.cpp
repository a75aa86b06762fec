// token_ranges.h: the walk over random lists of ranges counts every visible token once and touches no other row, except
// where a short range leaves no choice; and it can start anywhere.
#include <algorithm>
#include <random>
#include <vector>

#include "common/token_ranges.h"
#include "csrc/check.h"

using cfpp::KvTile;
using cfpp::RangeWalker;
using cfpp::Tail;

struct Ranges {
  std::vector<int32_t> pairs;
  int capacity = 0;

  int count() const { return static_cast<int>(pairs.size()) / 2; }
  bool shows(int token) const {
    for (int r = 0; r < count(); ++r) {
      if (pairs[2 * r] <= token && token < pairs[2 * r + 1]) return true;
    }
    return false;
  }
  std::string text() const {
    std::string result;
    for (int r = 0; r < count(); ++r) {
      result += "[" + std::to_string(pairs[2 * r]) + ", " + std::to_string(pairs[2 * r + 1]) + ") ";
    }
    return result;
  }
};

// Up to four disjoint ranges in any order, unused ones among them; lengths gather round multiples of a tile.
Ranges random_ranges(std::mt19937& random, int kv_rows) {
  const auto up_to = [&](int n) { return static_cast<int>(random() % (n + 1)); };
  std::vector<std::pair<int32_t, int32_t>> list;
  int end = 0;
  for (int i = up_to(3); i >= 0; --i) {
    const int first = end + up_to(1) * up_to(2 * kv_rows);
    const int length = up_to(1) ? 1 + up_to(3 * kv_rows) : std::max(1, kv_rows * up_to(3) + up_to(2) - 1);
    list.emplace_back(first, end = first + length);
  }
  for (int i = up_to(2); i > 0; --i) list.emplace_back(0, 0);
  std::shuffle(list.begin(), list.end(), random);
  Ranges ranges;
  for (const auto& [first, last] : list) {
    ranges.pairs.push_back(first);
    ranges.pairs.push_back(last);
  }
  ranges.capacity = end + up_to(5);
  return ranges;
}

void check_walk(const Ranges& ranges, int kv_rows, Tail tail) {
  const std::string context =
      ranges.text() + "kv_rows " + std::to_string(kv_rows) + (tail == Tail::kClip ? " clip" : " shift");
  RangeWalker walker(ranges.pairs.data(), ranges.count(), kv_rows, tail);
  const int tiles = walker.tiles();
  std::vector<KvTile> walk;
  std::vector<int> counted(ranges.capacity, 0);
  walker.seek(0);
  for (int i = 0; i < tiles; ++i) {
    const KvTile tile = walker.next();
    walk.push_back(tile);
    CHECK(0 <= tile.begin && tile.begin < tile.end && tile.end <= kv_rows, context);  // no tile without a key
    for (int row = tile.begin; row < tile.end; ++row) ++counted.at(tile.row + row);
    if (tail == Tail::kClip || tile.end < kv_rows) {
      CHECK(tile.begin == 0, context);
    } else {
      for (int row = 0; row < kv_rows; ++row) CHECK(ranges.shows(tile.row + row), context);
    }
  }
  for (int token = 0; token < ranges.capacity; ++token) CHECK(counted[token] == ranges.shows(token), context);
  // A clipped tile under kShift belongs to a range shorter than a tile.
  for (const KvTile& tile : walk) {
    if (tail != Tail::kShift || tile.end == kv_rows) continue;
    bool found = false;
    for (int r = 0; r < ranges.count(); ++r) {
      const int length = ranges.pairs[2 * r + 1] - ranges.pairs[2 * r];
      found = found || (ranges.pairs[2 * r] == tile.row && length == tile.end && length < kv_rows);
    }
    CHECK(found, context);
  }
  for (int start = 0; start < tiles; ++start) {
    walker.seek(start);
    for (int i = start; i < tiles; ++i) {
      const KvTile tile = walker.next();
      CHECK(tile.row == walk[i].row && tile.begin == walk[i].begin && tile.end == walk[i].end, context);
    }
  }
}

int main() {
  std::mt19937 random(5);
  for (int i = 0; i < 20000; ++i) {
    const int kv_rows = std::vector<int>{1, 2, 8, 32, 64, 176}[random() % 6];
    const Ranges ranges = random_ranges(random, kv_rows);
    check_walk(ranges, kv_rows, Tail::kClip);
    check_walk(ranges, kv_rows, Tail::kShift);
  }
  CHECK(cfpp::range_fits(0, 0, 10) && cfpp::range_fits(0, 10, 10) && cfpp::range_fits(9, 10, 10), "fits");
  CHECK(!cfpp::range_fits(-1, 5, 10) && !cfpp::range_fits(3, 11, 10) && !cfpp::range_fits(5, 5, 10), "does not fit");
  CHECK(!cfpp::range_fits(7, 3, 10), "backwards");
}

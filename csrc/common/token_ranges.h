// The walk over a group's visible token ranges in tiles of keys, and the checks of ranges. The kernels of every
// architecture use it, and a CPU test proves that each visible token is counted exactly once.
#pragma once

#include <cstdint>
#include <string>

#include "common/status.h"

namespace cfpp {

// One tile: kv_rows cache rows from `row` on. Columns [begin, end) of its logits count, the others are masked.
struct KvTile {
  int row, begin, end;
};

// Position of the tile that would reach past the end of its range.
enum class Tail {
  kClip,   // It starts where the previous tile ended. Rows past the range must be loaded as zeros.
  kShift,  // It is moved back until it ends with the range: only rows of the range are loaded, and its first columns,
           // which the previous tile counted, are masked. A range shorter than a tile is clipped instead.
};

// Walks `count` ranges [first, end) in tiles of `kv_rows`. Ranges are int32 pairs; an unused range is (0, 0).
class RangeWalker {
 public:
  CFPP_HOST_DEVICE RangeWalker(const int32_t* ranges, int count, int kv_rows, Tail tail)
      : ranges_(ranges), count_(count), kv_rows_(kv_rows), tail_(tail) {}

  CFPP_HOST_DEVICE int tiles() const {
    int total = 0;
    for (int r = 0; r < count_; ++r) total += tiles_of(r);
    return total;
  }

  // Makes next() return `tile` next, 0 <= tile < tiles().
  CFPP_HOST_DEVICE void seek(int tile) {
    range_ = 0;
    while (range_ < count_ && tile >= tiles_of(range_)) tile -= tiles_of(range_++);
    tile_ = tile;
  }

  CFPP_HOST_DEVICE KvTile next() {
    while (tile_ >= tiles_of(range_)) {
      ++range_;
      tile_ = 0;
    }
    const int first = ranges_[2 * range_], end = ranges_[2 * range_ + 1];
    const int row = first + kv_rows_ * tile_++;
    if (row + kv_rows_ <= end) return {row, 0, kv_rows_};
    if (tail_ == Tail::kShift && end - first >= kv_rows_) return {end - kv_rows_, row + kv_rows_ - end, kv_rows_};
    return {row, 0, end - row};
  }

 private:
  CFPP_HOST_DEVICE int tiles_of(int range) const {
    return (ranges_[2 * range + 1] - ranges_[2 * range] + kv_rows_ - 1) / kv_rows_;
  }

  const int32_t* ranges_;
  int count_, kv_rows_;
  Tail tail_;
  int range_ = 0, tile_ = 0;
};

// Returns true if [first, end) is valid in a list of ranges: (0, 0), or not empty and within the cache.
CFPP_HOST_DEVICE inline bool range_fits(int32_t first, int32_t end, int64_t capacity_tokens) {
  return (first == 0 && end == 0) || (first >= 0 && first < end && end <= capacity_tokens);
}

// Returns the error message of an op for the first range in [batch, groups, count, 2] that is not valid; empty if all
// are.
inline Status find_bad_range(const char* op, const int32_t* ranges, int64_t batch, int64_t groups, int64_t count,
                             int64_t capacity_tokens) {
  for (int64_t i = 0; i < batch * groups * count; ++i) {
    const int32_t first = ranges[2 * i], end = ranges[2 * i + 1];
    if (range_fits(first, end, capacity_tokens)) continue;
    const auto text = [](int64_t number) { return std::to_string(number); };
    return std::string(op) + ": ranges[" + text(i / count / groups) + ", " + text(i / count % groups) + ", " +
           text(i % count) + "] must be (0, 0) or 0 <= first < end <= capacity_tokens " + text(capacity_tokens) +
           ", got [" + text(first) + ", " + text(end) + ")";
  }
  return {};
}

}  // namespace cfpp

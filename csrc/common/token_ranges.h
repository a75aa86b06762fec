// The walk over a group's visible token ranges in tiles of keys, and the checks of ranges. Kernels on every
// architecture take their tiles from here, and a CPU test proves that each visible token is counted exactly once.
#pragma once

#include <cstdint>
#include <string>

#include "common/status.h"

namespace cfpp {

// One tile of kv_rows cache rows from `row` on. Columns [begin, end) of its logits count, the others are masked.
struct KvTile {
  int row, begin, end;
};

// How the last, ragged tile of a range lies.
enum class Tail {
  kClip,   // from where the tile before it ended: rows past the range must be loaded as zeros
  kShift,  // back, so that it ends with the range: only rows of the range are touched, its first columns have been
           // counted already. A range shorter than a tile has no room for that and is clipped.
};

// Walks `count` ranges [first, last) in tiles of `kv_rows`. Ranges are int32 pairs; (0, 0) stands for none.
class RangeWalker {
 public:
  CFPP_HOST_DEVICE RangeWalker(const int32_t* ranges, int count, int kv_rows, Tail tail)
      : ranges_(ranges), count_(count), kv_rows_(kv_rows), tail_(tail) {}

  CFPP_HOST_DEVICE int tiles() const {
    int total = 0;
    for (int r = 0; r < count_; ++r) total += tiles_of(r);
    return total;
  }

  // Makes `tile`, 0 <= tile < tiles(), the one that next() returns.
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
    const int first = ranges_[2 * range_], last = ranges_[2 * range_ + 1];
    const int row = first + kv_rows_ * tile_++;
    if (row + kv_rows_ <= last) return {row, 0, kv_rows_};
    if (tail_ == Tail::kShift && last - first >= kv_rows_) return {last - kv_rows_, row + kv_rows_ - last, kv_rows_};
    return {row, 0, last - row};
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

// True if [first, last) is valid in a list of ranges: (0, 0), or not empty and within the capacity.
CFPP_HOST_DEVICE inline bool range_fits(int32_t first, int32_t last, int64_t capacity) {
  return (first == 0 && last == 0) || (first >= 0 && first < last && last <= capacity);
}

// Message of an op for the first of ranges [batch, groups, count, 2] that does not fit; empty if all do.
inline Status find_bad_range(const char* op, const int32_t* ranges, int64_t batch, int64_t groups, int64_t count,
                             int64_t capacity) {
  for (int64_t i = 0; i < batch * groups * count; ++i) {
    const int32_t first = ranges[2 * i], last = ranges[2 * i + 1];
    if (range_fits(first, last, capacity)) continue;
    const auto text = [](int64_t number) { return std::to_string(number); };
    return std::string(op) + ": ranges[" + text(i / count / groups) + ", " + text(i / count % groups) + ", " +
           text(i % count) + "] must be (0, 0) or 0 <= first < last <= capacity " + text(capacity) + ", got [" +
           text(first) + ", " + text(last) + ")";
  }
  return {};
}

}  // namespace cfpp

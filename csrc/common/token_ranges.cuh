// The check of a token range before a kernel reads its keys.
#pragma once

#include "common/device.cuh"
#include "common/token_ranges.h"

namespace cfpp {

// Traps if [first, end) is not valid in a list of ranges.
__device__ __forceinline__ void check_range(int32_t first, int32_t end, int64_t capacity_tokens) {
  if (!range_fits(first, end, capacity_tokens)) __trap();
}

}  // namespace cfpp

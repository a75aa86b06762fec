// The check of a token range that kernels make before they read its keys.
#pragma once

#include "common/device.cuh"
#include "common/token_ranges.h"

namespace cfpp {

// Stops the kernel if [first, last) is not valid in a list of ranges.
__device__ __forceinline__ void check_range(int32_t first, int32_t last, int64_t capacity) {
  if (!range_fits(first, last, capacity)) __trap();
}

}  // namespace cfpp

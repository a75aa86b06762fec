// Reinterprets the bits of a value, or of a vector of values, as another type of the same size.
#pragma once

#include <cstring>

#include "common/status.h"

namespace cfpp {

template <typename To, typename From>
CFPP_HOST_DEVICE inline __attribute__((always_inline)) To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace cfpp

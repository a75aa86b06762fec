// float8 e4m3 (torch.float8_e4m3fn) for CPU kernels and for GPUs without an instruction for it: 4 bits of exponent with
// bias 7, 3 of mantissa, no infinity, largest 448, smallest normal 2^-6, subnormals in steps of 2^-9.
#pragma once

#include <cstdint>

#include "common/bits.h"

namespace cfpp {

struct float8 {
  uint8_t bits;
};

// Returns the code, in the low byte, of a float32 given by its bits: one number (uint32_t) or a GCC vector of them.
// Rounds to nearest, ties to even; larger numbers and infinity saturate at 448; NaN of either sign becomes 0x7f.
template <typename Float, typename Bits>
CFPP_HOST_DEVICE inline __attribute__((always_inline)) Bits narrow_to_float8(Bits bits) {
  const Bits sign = (bits >> 24) & 0x80u;
  const Bits magnitude = bits & 0x7fffffffu;
  const Bits normal = (magnitude - (120u << 23) + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;  // rebias 127 -> 7
  // Below 2^-6 adding 2^14 lets the float unit round to a multiple of 2^-9, the subnormal step.
  const Bits subnormal = bit_cast<Bits>(bit_cast<Float>(magnitude) + 16384.f) - 0x46800000u;
  const Bits largest = magnitude * 0u + 0x7eu;
  const Bits finite = magnitude >= 0x43e00000u ? largest : magnitude < 0x3c800000u ? subnormal : normal;
  const Bits code = finite | sign, nan = magnitude * 0u + 0x7fu;
  return magnitude > 0x7f800000u ? nan : code;
}

// Returns the bits of the float32 with this code; the conversion is exact.
template <typename Float, typename Bits>
CFPP_HOST_DEVICE inline __attribute__((always_inline)) Bits widen_float8(Bits code) {
  const Bits sign = (code & 0x80u) << 24;
  const Bits magnitude = code & 0x7fu;
  const Bits shifted = magnitude << 20;
  const Bits normal = shifted + (120u << 23);
  // 2^-6 (1 + mantissa / 8) - 2^-6: what a subnormal is.
  const Bits subnormal = bit_cast<Bits>(bit_cast<Float>(shifted + (121u << 23)) - 0.015625f);
  const Bits nan = magnitude * 0u + 0x7fc00000u;
  const Bits value = magnitude < 8u ? subnormal : normal;
  return (magnitude == 0x7fu ? nan : value) | sign;
}

}  // namespace cfpp

// 16-bit floats on the CPU: storage types, and conversions made of integer operations and selects only, so that
// loops over them vectorise on every x86-64 and Arm. Rounding is to nearest, ties to even; NaN stays NaN.
#pragma once

#include <cstdint>

#include "common/bits.h"

namespace cfpp {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The arithmetic, on the bits of one number (uint32_t) or of a vector of them (a GCC vector type).
template <typename Float, typename Bits>
[[gnu::always_inline]] inline Bits widen_float16(Bits bits) {
  const Bits sign = (bits & 0x8000u) << 16;
  const Bits shifted = (bits & 0x7fffu) << 13;
  const Bits exponent = shifted & 0x0f800000u;
  const Bits normal = shifted + (112u << 23);       // rebias 15 -> 127
  const Bits special = normal + (112u << 23);       // infinity and NaN: exponent 255
  const float magic = bit_cast<float>(113u << 23);  // 2^-14: a subnormal is mantissa * 2^-24
  const Bits subnormal = bit_cast<Bits>(bit_cast<Float>(normal + (1u << 23)) - magic);
  const Bits magnitude = exponent == 0x0f800000u ? special : exponent == 0u ? subnormal : normal;
  return magnitude | sign;
}

template <typename Bits>
[[gnu::always_inline]] inline Bits narrow_to_bfloat16(Bits bits) {
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet_nan = (bits >> 16) | 0x0040u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded;
}

template <typename Float, typename Bits>
[[gnu::always_inline]] inline Bits narrow_to_float16(Bits bits) {
  const Bits sign = (bits >> 16) & 0x8000u;
  const Bits magnitude = bits & 0x7fffffffu;
  const Bits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 adding 0.5 lets the float unit round to a multiple of 2^-24, the subnormal step.
  const Bits subnormal = bit_cast<Bits>(bit_cast<Float>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits special = magnitude > 0x7f800000u ? magnitude * 0u + 0x7e00u : magnitude * 0u + 0x7c00u;
  const Bits result = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? subnormal : normal;
  return result | sign;
}

[[gnu::always_inline]] inline float to_float(float value) { return value; }

[[gnu::always_inline]] inline float to_float(bfloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

[[gnu::always_inline]] inline float to_float(float16 value) {
  return bit_cast<float>(widen_float16<float, uint32_t>(value.bits));
}

template <typename T>
T from_float(float value);

template <>
[[gnu::always_inline]] inline float from_float<float>(float value) {
  return value;
}

template <>
[[gnu::always_inline]] inline bfloat16 from_float<bfloat16>(float value) {
  return {static_cast<uint16_t>(narrow_to_bfloat16(bit_cast<uint32_t>(value)))};
}

template <>
[[gnu::always_inline]] inline float16 from_float<float16>(float value) {
  return {static_cast<uint16_t>(narrow_to_float16<float>(bit_cast<uint32_t>(value)))};
}

}  // namespace cfpp

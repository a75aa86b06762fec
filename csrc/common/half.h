// 16-bit floats on the CPU: storage types, and conversions made of integer operations and selects only, so that
// loops over them vectorise on every x86-64 and Arm. Rounding is to nearest, ties to even; NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace cfpp {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename To, typename From>
[[gnu::always_inline]] inline To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

[[gnu::always_inline]] inline float to_float(float value) { return value; }

[[gnu::always_inline]] inline float to_float(bfloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

[[gnu::always_inline]] inline float to_float(float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t shifted = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t exponent = shifted & 0x0f800000u;
  const uint32_t normal = shifted + (112u << 23);   // rebias 15 -> 127
  const uint32_t special = normal + (112u << 23);   // infinity and NaN: exponent 255
  const float magic = bit_cast<float>(113u << 23);  // 2^-14: a subnormal is mantissa * 2^-24
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(normal + (1u << 23)) - magic);
  const uint32_t magnitude = exponent == 0x0f800000u ? special : exponent == 0 ? subnormal : normal;
  return bit_cast<float>(magnitude | sign);
}

template <typename T>
T from_float(float value);

template <>
[[gnu::always_inline]] inline float from_float<float>(float value) {
  return value;
}

template <>
[[gnu::always_inline]] inline bfloat16 from_float<bfloat16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x0040u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
}

template <>
[[gnu::always_inline]] inline float16 from_float<float16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 adding 0.5 lets the float unit round to a multiple of 2^-24, the subnormal step.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t result = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? subnormal : normal;
  return {static_cast<uint16_t>(result | sign)};
}

}  // namespace cfpp

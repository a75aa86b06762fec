// float8 e4m3 on the device: packs of values to packs of codes and back, by instruction from sm_89 on.
#pragma once

#include "common/device.cuh"
#include "common/float8.h"

namespace cfpp {

// Codes of two floats, that of `low` in the lower byte; narrow_to_float8 in one instruction.
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
#if __CUDA_ARCH__ >= 890
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
#else
  return narrow_to_float8<float>(__float_as_uint(low)) | narrow_to_float8<float>(__float_as_uint(high)) << 8;
#endif
}

// The floats of the codes in the two lower bytes.
__device__ __forceinline__ float2 widen_pair(uint32_t codes) {
#if __CUDA_ARCH__ >= 890
  uint32_t halves;  // holds every e4m3 number exactly
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(codes)));
  __half2 pair;
  memcpy(&pair, &halves, sizeof(pair));
  return __half22float2(pair);
#else
  return make_float2(__uint_as_float(widen_float8<float, uint32_t>(codes & 0xffu)),
                     __uint_as_float(widen_float8<float, uint32_t>(codes >> 8 & 0xffu)));
#endif
}

}  // namespace cfpp

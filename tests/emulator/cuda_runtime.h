// Stands in for the CUDA header of this name when kernels are built for the emulator: keywords, built-in variables,
// warp functions, and as much of the runtime as launchers call.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstddef>

#include "core.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // CTAs run one after the other; not poisoned, and without a shared address
#define threadIdx (emulator::thread().index)
#define blockIdx (emulator::cta().index)
#define blockDim (emulator::cta().block)
#define gridDim (emulator::cta().grid)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }

// ---- device functions ----

[[noreturn]] inline void __trap() { emulator::fail("trap"); }
inline void __syncthreads() { emulator::barrier_sync(0, emulator::cta().threads); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { emulator::yield(); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <typename T>
void __stwb(T* pointer, T value) {
  *pointer = value;
}
template <typename T>
T atomicAdd(T* pointer, T value) {
  const T old = *pointer;
  *pointer = old + value;
  return old;
}

namespace emulator {
inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) fail("warp functions of part of a warp are not emulated");
}

// out[lane] = in[source(lane)]
template <typename T, typename Source>
T shuffle(unsigned mask, const char* name, T value, Source source) {
  check_mask(mask);
  struct Lane {
    T in, out;
    int from;
  } mine{value, value, source(thread().lane())};
  meet(my_warp(), name, &mine, [](Lane** all) {
    for (int lane = 0; lane < kWarp; ++lane) {
      const int from = all[lane]->from;
      all[lane]->out = all[from >= 0 && from < kWarp ? from : lane]->in;
    }
  });
  return mine.out;
}
}  // namespace emulator

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::check_mask(mask);
  int nothing = 0;
  emulator::meet(emulator::my_warp(), "__syncwarp", &nothing, [](int**) {});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return emulator::shuffle(mask, "__shfl_xor_sync", value, [=](int lane) { return lane ^ other; });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return emulator::shuffle(mask, "__shfl_down_sync", value, [=](int lane) { return lane + static_cast<int>(delta); });
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return emulator::shuffle(mask, "__shfl_sync", value, [=](int) { return from; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  emulator::check_mask(mask);
  struct Lane {
    bool in;
    unsigned out;
  } mine{predicate != 0, 0};
  emulator::meet(emulator::my_warp(), "__ballot_sync", &mine, [](Lane** all) {
    unsigned votes = 0;
    for (int lane = 0; lane < emulator::kWarp; ++lane) votes |= static_cast<unsigned>(all[lane]->in) << lane;
    for (int lane = 0; lane < emulator::kWarp; ++lane) all[lane]->out = votes;
  });
  return mine.out;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

// ---- runtime ----

// One device of each kind of shared memory that launchers choose by.
struct EmulatedDevice {
  int major, minor, shared_per_sm;
};
constexpr EmulatedDevice kEmulatedDevices[] = {{8, 0, 164 * 1024}, {8, 6, 100 * 1024}, {9, 0, 228 * 1024}};
constexpr int kEmulatedSms = 3;
inline int emulated_device = 0;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchOutOfResources = 701,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    default:
      return "too many resources requested for launch";
  }
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 2) return cudaErrorInvalidDevice;
  emulated_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulated_device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device > 2) return cudaErrorInvalidDevice;
  const EmulatedDevice& it = kEmulatedDevices[device];
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kEmulatedSms;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = it.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = it.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = it.shared_per_sm;
      break;
  }
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= kEmulatedDevices[emulated_device].shared_per_sm - 1024 ? cudaSuccess : cudaErrorInvalidValue;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* ctas, Kernel, int, size_t shared_bytes) {
  *ctas = static_cast<int>(kEmulatedDevices[emulated_device].shared_per_sm / (shared_bytes + 1024));
  return cudaSuccess;
}

// Device helpers shared by the kernels: dtype conversion, vector access, reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace cfpp {

constexpr int kWarpSize = 32;
constexpr float kLog2E = 1.4426950408889634f;

// Online softmax: the running maximum that probabilities are relative to may lag behind the true one by this much in
// base 2. Probabilities stay below 2^8, and earlier partial results seldom need to be multiplied (1 to 3 % of the tiles
// on an H200). The result is as accurate: numerator and denominator grow alike, and rounding to 16 bits is relative.
constexpr float kMaxLag = 8.f;

template <typename T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// kWidth elements that move as one access when kVector (the address must then be aligned to their size).
template <typename T, int kWidth, bool kVector>
struct alignas(kVector ? kWidth * sizeof(T) : alignof(T)) Pack {
  T value[kWidth];
};

// Sum of both components over the CTA's threads of one threadIdx.y, the same in each of them and in every run.
// blockDim.x is a multiple of a warp. shared: one float2 per warp of the CTA.
__device__ __forceinline__ float2 row_sum(float2 sum, float2* shared) {
#pragma unroll
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2) {
    sum.x += __shfl_xor_sync(0xffffffffu, sum.x, lane);
    sum.y += __shfl_xor_sync(0xffffffffu, sum.y, lane);
  }
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  if (warps == 1) return sum;
  float2* own = shared + threadIdx.y * warps;
  if (threadIdx.x % kWarpSize == 0) own[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  float2 total = make_float2(0.f, 0.f);
  for (int warp = 0; warp < warps; ++warp) {
    total.x += own[warp].x;
    total.y += own[warp].y;
  }
  return total;
}

// The CTA's dynamic shared memory. Its address is a multiple of 16 bytes, and of 1024 where the CTA has nothing before
// it.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#ifdef CFPP_EMULATE
  return emulator::cta().shared;
#else
  extern __shared__ uint4 cfpp_dynamic_shared[];
  return reinterpret_cast<unsigned char*>(cfpp_dynamic_shared);
#endif
}

// Enqueues the kernel; tests run it on the host instead (tests/emulator).
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                   Args&&... args) {
#ifdef CFPP_EMULATE
  static_cast<void>(stream);
  emulator::run_grid(grid, threads, shared_bytes, [&] { kernel(args...); });
  return cudaSuccess;
#else
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
#endif
}

// Makes `device` current for this scope, and the caller's device again after it.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    changed_ = error_ == cudaSuccess && previous_ != device;
    if (changed_) error_ = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace cfpp

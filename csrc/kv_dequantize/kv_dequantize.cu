// CUDA kernel of kv_dequantize_.
// One thread: one pack of 8 channels of one token, of keys and of values. It reads 8 bytes and writes 16 or 32 of each,
//   next to its neighbours. The grid covers the capacity. Threads of tokens outside all ranges return after reading the
//   ranges, which are a few bytes in L1.
// What binds: bytes, 3 (16-bit outputs) or 5 per element and visible token.
#include <cstring>
#include <initializer_list>

#include "common/device.cuh"
#include "common/float8.cuh"
#include "kv_dequantize/kv_dequantize.h"

namespace cfpp {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float largest(float) { return 3.402823466e38f; }
__device__ __forceinline__ float largest(__nv_bfloat16) { return 3.389531390e38f; }
__device__ __forceinline__ float largest(__half) { return 65504.f; }

__device__ __forceinline__ bool is_visible(const int32_t* ranges, int count, int token) {
  bool seen = false;
  for (int i = 0; i < count; ++i) seen = seen || (__ldg(ranges + 2 * i) <= token && token < __ldg(ranges + 2 * i + 1));
  return seen;
}

template <typename T, int kWidth, bool kVector>
__device__ __forceinline__ void widen(const uint8_t* codes, float scale, T* target) {
  using Codes = Pack<uint8_t, kWidth, kVector>;
  using Values = Pack<T, kWidth, kVector>;
  const Codes pack = *reinterpret_cast<const Codes*>(codes);
  const auto narrow = [&](float x) {  // no fminf: it would lose NaN
    const float scaled = x * scale, limit = largest(T{});
    return from_float<T>(scaled > limit ? limit : scaled < -limit ? -limit : scaled);
  };
  Values values;
#pragma unroll
  for (int i = 0; i < kWidth; i += 2) {
    const float2 pair = widen_pair(pack.value[i] | pack.value[i + 1] << 8);
    values.value[i] = narrow(pair.x);
    values.value[i + 1] = narrow(pair.y);
  }
  if constexpr (kVector) {  // the compiler alone would store a struct of 16-bit floats in pieces of 4
    uint4 bits[sizeof(Values) / sizeof(uint4)];
    memcpy(bits, &values, sizeof(values));
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Values) / sizeof(uint4)); ++i) {
      reinterpret_cast<uint4*>(target)[i] = bits[i];
    }
  } else {
    *reinterpret_cast<Values*>(target) = values;
  }
}

template <typename T, int kWidth, bool kVector>
__global__ void __launch_bounds__(kThreads) kv_dequantize_kernel(const KvDequantizeParams p) {
  const int packs = static_cast<int>(p.head_dim) / kWidth;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int token = static_cast<int>(index / packs), channel = static_cast<int>(index % packs) * kWidth;
  const int head = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z);
  const int lists = static_cast<int>(p.groups * p.ranges);
  if (token >= p.capacity || !is_visible(p.ranges_ptr + 2 * b * lists, lists, token)) return;
  const auto at = [&](const int64_t (&stride)[3]) {
    return b * stride[0] + head * stride[1] + token * stride[2] + channel;
  };
  const int64_t scale = b * p.heads + head;
  widen<T, kWidth, kVector>(p.k_cache_ptr + at(p.k_cache_stride), __ldg(p.k_scale_ptr + scale),
                            static_cast<T*>(p.k_out_ptr) + at(p.k_out_stride));
  widen<T, kWidth, kVector>(p.v_cache_ptr + at(p.v_cache_stride), __ldg(p.v_scale_ptr + scale),
                            static_cast<T*>(p.v_out_ptr) + at(p.v_out_stride));
}

// All packs of 8 lie at multiples of their size.
bool vectors_fit(const KvDequantizeParams& p) {
  const int64_t bytes = 8 * size_of(p.dtype);
  bool fits = p.head_dim % 8 == 0;
  for (const void* pointer : {p.k_out_ptr, p.v_out_ptr}) {
    fits = fits && reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
  }
  for (const uint8_t* pointer : {p.k_cache_ptr, p.v_cache_ptr}) {
    fits = fits && reinterpret_cast<uintptr_t>(pointer) % 8 == 0;
  }
  for (const auto* stride : {&p.k_out_stride, &p.v_out_stride, &p.k_cache_stride, &p.v_cache_stride}) {
    for (const int64_t step : *stride) fits = fits && step % 8 == 0;
  }
  return fits;
}

template <typename T, int kWidth, bool kVector>
void launch(const KvDequantizeParams& p, cudaStream_t stream) {
  const int64_t ctas = ceil_div<int64_t>(p.capacity * (p.head_dim / kWidth), kThreads);
  const dim3 grid(static_cast<unsigned>(ctas), static_cast<unsigned>(p.heads), static_cast<unsigned>(p.batch));
  kv_dequantize_kernel<T, kWidth, kVector><<<grid, kThreads, 0, stream>>>(p);
}

}  // namespace

Status kv_dequantize_cuda(const KvDequantizeParams& p, int device, void* stream) {
  DeviceGuard guard(device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) {
    dispatch_dtype<float, __nv_bfloat16, __half>(p.dtype, [&](auto tag) {
      using T = decltype(tag);
      (vectors_fit(p) ? launch<T, 8, true> : launch<T, 2, false>)(p, static_cast<cudaStream_t>(stream));
    });
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? Status{} : Status("kv_dequantize_: ") + cudaGetErrorString(error);
}

}  // namespace cfpp

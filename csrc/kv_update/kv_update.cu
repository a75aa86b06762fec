// CUDA kernel of kv_update_. One CTA makes one token of one batch row: its q, k and v rows are read in packs (16 bytes
// a thread and access), q and k are reduced together, rotated and written, v is moved untouched; a float8 cache gets
// the codes of k and v divided by their head's scale, rounded once. Up to 1024 packs a row (8192 channels in 16-bit,
// 4096 in float32; 640 with float8) each thread keeps its pack in registers between the two passes; wider or unaligned
// rows are read a second time, from L1. What binds: bytes. 6 * H * D elements move per token (3 in, 3 out); about 20
// FLOPs per element of q and k are far below the roof. A frame is only a few waves of CTAs, so the chain of waits
// within one counts: all that a thread reads is asked for before it waits for any of it. Norm weights and rotation
// tables are shared by all CTAs and stay in L2 and L1. Assumes: D even; a head starts on a pack boundary (D % kWidth ==
// 0); for packs of 16 bytes also that all pointers and strides are multiples of 16 bytes, else the launcher takes packs
// of 2 elements moved one by one. A write_index outside [0, capacity - S / groups] traps: see kv_update.h.
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "common/device.cuh"
#include "common/float8.cuh"
#include "kv_update/kv_update.h"

namespace cfpp {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxCodeThreads =
    640;  // where float8 is written: a pack then takes more registers than 1024 threads have
constexpr int kRereadThreads = 256;

template <typename T, int kWidth>
__device__ __forceinline__ float sum_of_squares(const T (&x)[kWidth]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum = fmaf(to_float(x[i]), to_float(x[i]), sum);
  return sum;
}

// (cos, sin) of pair `pair` of a head, from the table of its axis.
__device__ __forceinline__ float2 rotation(int pair, int time_pairs, int row_pairs, const float* time, const float* row,
                                           const float* column) {
  const float* table = time;
  if (pair >= time_pairs + row_pairs) {
    table = column - 2 * (time_pairs + row_pairs);
  } else if (pair >= time_pairs) {
    table = row - 2 * time_pairs;
  }
  return make_float2(__ldg(table + 2 * pair), __ldg(table + 2 * pair + 1));
}

// Normalises and rotates one adjacent pair of channels.
template <typename T>
__device__ __forceinline__ float2 rotate(const T* x, const T* weight, float scale, float2 r) {
  const float x0 = to_float(x[0]) * scale * to_float(weight[0]);
  const float x1 = to_float(x[1]) * scale * to_float(weight[1]);
  return make_float2(x0 * r.x - x1 * r.y, x0 * r.y + x1 * r.x);
}

// Writes kWidth codes of one head: `pair(i)` are channels i and i + 1, `scale` is the head's.
template <int kWidth, bool kVector, typename F>
__device__ __forceinline__ void write_codes(uint8_t* target, float scale, const F& pair) {
  const float to_code = 1.f / scale;
  uint32_t codes[kWidth / 2];
#pragma unroll
  for (int i = 0; i < kWidth; i += 2) {
    const float2 x = pair(i);
    codes[i / 2] = narrow_pair(x.x * to_code, x.y * to_code);
  }
  if constexpr (kVector && kWidth == 8) {
    __stwb(reinterpret_cast<uint2*>(target), make_uint2(codes[0] | codes[1] << 16, codes[2] | codes[3] << 16));
  } else if constexpr (kVector && kWidth == 4) {
    __stwb(reinterpret_cast<uint32_t*>(target), codes[0] | codes[1] << 16);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) target[i] = static_cast<uint8_t>(codes[i / 2] >> 8 * (i % 2));
  }
}

// One access of 16 bytes if kVector; the compiler alone would store a struct of 16-bit floats in pieces of 4.
template <typename T, int kWidth, bool kVector>
__device__ __forceinline__ void write_pack(T* target, const Pack<T, kWidth, kVector>& pack) {
  if constexpr (kVector) {
    static_assert(sizeof(pack) == sizeof(uint4));
    uint4 bits;
    memcpy(&bits, &pack, sizeof(bits));
    __stwb(reinterpret_cast<uint4*>(target), bits);
  } else {
    *reinterpret_cast<Pack<T, kWidth, kVector>*>(target) = pack;
  }
}

// What a pack of q and one of k are multiplied with.
template <typename P, int kWidth>
struct Factors {
  P q_weight, k_weight;
  float2 rotation[kWidth / 2];
};

// C: what the cache holds, T or uint8_t for float8 codes.
// kHold: blockDim.x * kWidth >= H * D, so that a thread has one pack per row and keeps it in registers.
template <typename T, typename C, int kWidth, bool kVector, bool kHold>
__global__ void __launch_bounds__(!kHold                 ? kRereadThreads
                                  : std::is_same_v<T, C> ? kMaxThreads
                                                         : kMaxCodeThreads) kv_update_kernel(const KvUpdateParams p) {
  using P = Pack<T, kWidth, kVector>;
  constexpr bool kCodes = !std::is_same_v<T, C>;
  __shared__ float2 warp_sums[kMaxThreads / kWarpSize];
  const int token = static_cast<int>(blockIdx.x), b = static_cast<int>(blockIdx.y);
  const int head_dim = static_cast<int>(p.head_dim);
  const int packs = static_cast<int>(p.channels()) / kWidth;
  const int group_tokens = static_cast<int>(p.tokens_per_group());
  const int group = token / group_tokens;
  const int first = p.write_index_ptr[b * p.write_index_stride[0] + group * p.write_index_stride[1]];
  const int64_t slot = first + token % group_tokens;

  const T* q_row = static_cast<const T*>(p.q_ptr) + b * p.q_stride[0] + token * p.q_stride[1];
  const T* k_row = static_cast<const T*>(p.k_ptr) + b * p.k_stride[0] + token * p.k_stride[1];
  const T* v_row = static_cast<const T*>(p.v_ptr) + b * p.v_stride[0] + token * p.v_stride[1];
  T* q_out = static_cast<T*>(p.q_out_ptr) + (b * p.heads * p.tokens() + token) * head_dim;
  C* k_out = static_cast<C*>(p.k_cache_ptr) + b * p.k_cache_stride[0] + slot * p.k_cache_stride[2];
  C* v_out = static_cast<C*>(p.v_cache_ptr) + b * p.v_cache_stride[0] + slot * p.v_cache_stride[2];

  const int columns = static_cast<int>(p.columns), rows = static_cast<int>(p.rows);
  const int column = token % columns, row = token / columns % rows, frame = token / (columns * rows);
  const int time_pairs = static_cast<int>(p.time_pairs), row_pairs = static_cast<int>(p.row_pairs);
  const float* time = p.rope_t_ptr + b * p.rope_t_stride[0] + frame * p.rope_t_stride[1];
  const float* vertical = p.rope_h_ptr + row * 2 * p.row_pairs;
  const float* horizontal = p.rope_w_ptr + column * 2 * p.column_pairs;

  const auto read = [](const void* source, int channel) {
    return *reinterpret_cast<const P*>(static_cast<const T*>(source) + channel);
  };
  const auto read_factors = [&](int channel) {
    Factors<P, kWidth> f{read(p.q_norm_ptr, channel), read(p.k_norm_ptr, channel), {}};
    const int pair = channel % head_dim / 2;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      f.rotation[i] = rotation(pair + i, time_pairs, row_pairs, time, vertical, horizontal);
    }
    return f;
  };
  const auto write_v = [&](int channel, const P& v) {
    const int head = channel / head_dim;
    C* target = v_out + head * p.v_cache_stride[1] + (channel - head * head_dim);
    if constexpr (kCodes) {
      write_codes<kWidth, kVector>(target, __ldg(p.v_scale_ptr + b * p.heads + head),
                                   [&](int i) { return make_float2(to_float(v.value[i]), to_float(v.value[i + 1])); });
    } else {
      write_pack(target, v);
    }
  };
  const auto rotate_pack = [&](const P& x, const P& weight, const Factors<P, kWidth>& f, float scale) {
    P turned;
#pragma unroll
    for (int i = 0; i < kWidth; i += 2) {
      const float2 pair = rotate(x.value + i, weight.value + i, scale, f.rotation[i / 2]);
      turned.value[i] = from_float<T>(pair.x);
      turned.value[i + 1] = from_float<T>(pair.y);
    }
    return turned;
  };
  const auto write_q_and_k = [&](int channel, const P& q, const P& k, const Factors<P, kWidth>& f, float q_scale,
                                 float k_scale) {
    const int head = channel / head_dim, within = channel - head * head_dim;
    write_pack(q_out + head * p.tokens() * head_dim + within, rotate_pack(q, f.q_weight, f, q_scale));
    C* target = k_out + head * p.k_cache_stride[1] + within;
    if constexpr (kCodes) {
      write_codes<kWidth, kVector>(target, __ldg(p.k_scale_ptr + b * p.heads + head), [&](int i) {
        return rotate(k.value + i, f.k_weight.value + i, k_scale, f.rotation[i / 2]);
      });
    } else {
      write_pack(target, rotate_pack(k, f.k_weight, f, k_scale));
    }
  };
  const auto check_slot = [&] {
    if (first < 0 || first > p.capacity - group_tokens) __trap();
  };
  const auto scale_of = [&](float sum) { return rsqrtf(fmaf(sum, 1.f / static_cast<float>(p.channels()), p.eps)); };

  float2 sum = make_float2(0.f, 0.f);
  if constexpr (kHold) {
    const int channel = static_cast<int>(threadIdx.x) * kWidth;
    const bool active = static_cast<int>(threadIdx.x) < packs;
    P q{}, k{}, v{};
    Factors<P, kWidth> factors{};
    if (active) {
      q = read(q_row, channel);
      k = read(k_row, channel);
      v = read(v_row, channel);
      factors = read_factors(channel);
    }
    check_slot();  // only now: it waits for the index
    if (active) write_v(channel, v);
    sum = cta_sum(make_float2(sum_of_squares(q.value), sum_of_squares(k.value)), warp_sums);
    if (active) write_q_and_k(channel, q, k, factors, scale_of(sum.x), scale_of(sum.y));
  } else {
    check_slot();
    for (int pack = threadIdx.x; pack < packs; pack += blockDim.x) {
      const P q = read(q_row, pack * kWidth), k = read(k_row, pack * kWidth);
      write_v(pack * kWidth, read(v_row, pack * kWidth));
      sum.x += sum_of_squares(q.value);
      sum.y += sum_of_squares(k.value);
    }
    sum = cta_sum(sum, warp_sums);
    const float q_scale = scale_of(sum.x), k_scale = scale_of(sum.y);
    for (int pack = threadIdx.x; pack < packs; pack += blockDim.x) {
      const int channel = pack * kWidth;
      write_q_and_k(channel, read(q_row, channel), read(k_row, channel), read_factors(channel), q_scale, k_scale);
    }
  }
}

// All addresses and strides that a 16-byte access would meet are multiples of 16 bytes; of a float8 cache, of a pack.
bool vectors_fit(const KvUpdateParams& p) {
  const int64_t width = 16 / size_of(p.dtype);
  bool fits = p.head_dim % width == 0;
  for (const void* pointer :
       {static_cast<const void*>(p.q_out_ptr), p.q_ptr, p.k_ptr, p.v_ptr, p.q_norm_ptr, p.k_norm_ptr}) {
    fits = fits && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  }
  for (const void* pointer : {p.k_cache_ptr, p.v_cache_ptr}) {
    fits = fits && reinterpret_cast<uintptr_t>(pointer) % (width * size_of(p.cache_dtype)) == 0;
  }
  for (int i = 0; i < 3; ++i) fits = fits && p.k_cache_stride[i] % width == 0 && p.v_cache_stride[i] % width == 0;
  for (int i = 0; i < 2; ++i) {
    fits = fits && p.q_stride[i] % width == 0 && p.k_stride[i] % width == 0 && p.v_stride[i] % width == 0;
  }
  return fits;
}

template <typename T, typename C, int kWidth, bool kVector, bool kHold>
void launch(const KvUpdateParams& p, cudaStream_t stream) {
  const int64_t full = ceil_div<int64_t>(p.channels() / kWidth, kWarpSize) * kWarpSize;
  const int64_t threads = kHold || full < kRereadThreads ? full : kRereadThreads;
  const dim3 grid(static_cast<unsigned>(p.tokens()), static_cast<unsigned>(p.batch));
  kv_update_kernel<T, C, kWidth, kVector, kHold><<<grid, static_cast<unsigned>(threads), 0, stream>>>(p);
}

template <typename T, typename C>
void launch_for(const KvUpdateParams& p, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  if (!vectors_fit(p)) {
    launch<T, C, 2, false, false>(p, stream);
  } else if (p.channels() <= kWidth * (std::is_same_v<T, C> ? kMaxThreads : kMaxCodeThreads)) {
    launch<T, C, kWidth, true, true>(p, stream);
  } else {
    launch<T, C, kWidth, true, false>(p, stream);
  }
}

}  // namespace

Status kv_update_cuda(const KvUpdateParams& p, int device, void* stream) {
  DeviceGuard guard(device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) {
    const auto run = [&](auto tag) {
      using T = decltype(tag);
      const bool codes = p.cache_dtype == DType::kFloat8E4M3;
      (codes ? launch_for<T, uint8_t> : launch_for<T, T>)(p, static_cast<cudaStream_t>(stream));
    };
    dispatch_dtype<float, __nv_bfloat16, __half>(p.dtype, run);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? Status{} : Status("kv_update_: ") + cudaGetErrorString(error);
}

}  // namespace cfpp

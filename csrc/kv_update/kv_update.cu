// CUDA kernels of kv_update_.
// One CTA: a few tokens, or one wide token. Its threads read the rows of q, k and v in packs of 16 bytes, reduce q and
// k
//   together, rotate both, and copy v unchanged. For a float8 cache, k and v are divided by their head's scale and
//   rounded once. One frame is only 1560 tokens, so latency counts as well as bytes in flight: each token uses the
//   fewest warps whose registers take its rows (kMaxPacks packs of each row per lane: two warps for 1536 channels in 16
//   bits), all loads are issued before the first use, and warps synchronise only if a token spans several. Wider or
//   unaligned rows are read twice, the second time from L1.
// What binds: bytes. 6 * H * D elements move per token, 3 in and 3 out. The 20 FLOPs per element of q and k are far
//   below the peak. Norm weights and rotation tables are shared by all CTAs and stay in L2 and L1.
// Assumes: D is even, and a head starts on a pack boundary (D % kWidth == 0). Packs of 16 bytes need all pointers and
//   strides to be multiples of 16 bytes; else the launcher takes packs of 2 elements, moved one by one. A write_index
//   outside [0, capacity - S / groups] traps, see kv_update.h.
#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "common/device.cuh"
#include "common/float8.cuh"
#include "kv_update/kv_update.h"

namespace cfpp {
namespace {

constexpr int kMaxPacks =
    3;  // of each of q, k and v per lane; with 6 (1.2 x the time on an H200) few warps fit on an SM
constexpr int kMaxWarps = 16;  // of one token
constexpr int kCtaThreads = 128, kRereadThreads = 256;

template <typename T, int kWidth>
__device__ __forceinline__ float sum_of_squares(const T (&x)[kWidth]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum = fmaf(to_float(x[i]), to_float(x[i]), sum);
  return sum;
}

// Returns (cos, sin) of pair `pair` of a head, from the table of its axis.
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

// One token of one batch row. C: type of a cache element, T or uint8_t for float8 codes.
template <typename T, typename C, int kWidth, bool kVector>
struct Token {
  using P = Pack<T, kWidth, kVector>;
  static constexpr bool kCodes = !std::is_same_v<T, C>;
  const KvUpdateParams& p;
  const int b, head_dim, group_tokens, first;  // first: slot of the group's first token
  const T *q_row, *k_row, *v_row;
  T* q_out;
  C *k_out, *v_out;
  const float *time, *vertical, *horizontal;

  __device__ __forceinline__ Token(const KvUpdateParams& params, int batch_row, int token)
      : p(params),
        b(batch_row),
        head_dim(static_cast<int>(p.head_dim)),
        group_tokens(static_cast<int>(p.tokens_per_group())),
        first(p.write_index_ptr[b * p.write_index_stride[0] + token / group_tokens * p.write_index_stride[1]]) {
    q_row = static_cast<const T*>(p.q_ptr) + b * p.q_stride[0] + token * p.q_stride[1];
    k_row = static_cast<const T*>(p.k_ptr) + b * p.k_stride[0] + token * p.k_stride[1];
    v_row = static_cast<const T*>(p.v_ptr) + b * p.v_stride[0] + token * p.v_stride[1];
    q_out = static_cast<T*>(p.q_out_ptr) + (b * p.heads * p.tokens() + token) * head_dim;
    const int64_t slot = first + token % group_tokens;
    k_out = static_cast<C*>(p.k_cache_ptr) + b * p.k_cache_stride[0] + slot * p.k_cache_stride[2];
    v_out = static_cast<C*>(p.v_cache_ptr) + b * p.v_cache_stride[0] + slot * p.v_cache_stride[2];
    const int columns = static_cast<int>(p.columns), rows = static_cast<int>(p.rows);
    const int column = token % columns, row = token / columns % rows, frame = token / (columns * rows);
    time = p.rope_t_ptr + b * p.rope_t_stride[0] + frame * p.rope_t_stride[1];
    vertical = p.rope_h_ptr + row * 2 * p.row_pairs;
    horizontal = p.rope_w_ptr + column * 2 * p.column_pairs;
  }

  // Called after the loads of the rows are issued, since it waits for the index.
  __device__ __forceinline__ void check_slot() const {
    if (first < 0 || first > p.capacity - group_tokens) __trap();
  }
  __device__ __forceinline__ static P read(const void* source, int channel) {
    return *reinterpret_cast<const P*>(static_cast<const T*>(source) + channel);
  }
  __device__ __forceinline__ void read_rotation(int channel, float2 (&turn)[kWidth / 2]) const {
    const int pair = channel % head_dim / 2;
    const int time_pairs = static_cast<int>(p.time_pairs), row_pairs = static_cast<int>(p.row_pairs);
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      turn[i] = rotation(pair + i, time_pairs, row_pairs, time, vertical, horizontal);
    }
  }
  __device__ __forceinline__ void write_v(int channel, const P& v) const {
    const int head = channel / head_dim;
    C* target = v_out + head * p.v_cache_stride[1] + (channel - head * head_dim);
    if constexpr (kCodes) {
      write_codes<kWidth, kVector>(target, __ldg(p.v_scale_ptr + b * p.heads + head),
                                   [&](int i) { return make_float2(to_float(v.value[i]), to_float(v.value[i + 1])); });
    } else {
      write_pack(target, v);
    }
  }
  __device__ __forceinline__ static P rotate_pack(const P& x, const P& weight, const float2 (&turn)[kWidth / 2],
                                                  float scale) {
    P turned;
#pragma unroll
    for (int i = 0; i < kWidth; i += 2) {
      const float2 pair = rotate(x.value + i, weight.value + i, scale, turn[i / 2]);
      turned.value[i] = from_float<T>(pair.x);
      turned.value[i + 1] = from_float<T>(pair.y);
    }
    return turned;
  }
  // scales: 1 / RMS of q and of k.
  __device__ __forceinline__ void write_q_and_k(int channel, const P& q, const P& k, const float2 (&turn)[kWidth / 2],
                                                float2 scales) const {
    const int head = channel / head_dim, within = channel - head * head_dim;
    const P q_weight = read(p.q_norm_ptr, channel), k_weight = read(p.k_norm_ptr, channel);
    write_pack(q_out + head * p.tokens() * head_dim + within, rotate_pack(q, q_weight, turn, scales.x));
    C* target = k_out + head * p.k_cache_stride[1] + within;
    if constexpr (kCodes) {
      write_codes<kWidth, kVector>(target, __ldg(p.k_scale_ptr + b * p.heads + head), [&](int i) {
        return rotate(k.value + i, k_weight.value + i, scales.y, turn[i / 2]);
      });
    } else {
      write_pack(target, rotate_pack(k, k_weight, turn, scales.y));
    }
  }
  __device__ __forceinline__ float2 scales_of(float2 sums) const {
    const float share = 1.f / static_cast<float>(p.channels());
    return make_float2(rsqrtf(fmaf(sums.x, share, p.eps)), rsqrtf(fmaf(sums.y, share, p.eps)));
  }
};

// The rows stay in registers. blockDim.x threads share a token, blockDim.y tokens share a CTA. A thread has kPacks
// packs of each row, every blockDim.x-th.
template <typename T, typename C, int kWidth, int kPacks>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize) kv_update_register_kernel(const KvUpdateParams p) {
  using P = Pack<T, kWidth, true>;
  __shared__ float2 warp_sums[kCtaThreads / kWarpSize + kMaxWarps];
  const int index = static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y), tokens = static_cast<int>(p.tokens());
  const Token<T, C, kWidth, true> token(p, static_cast<int>(blockIdx.y), index < tokens ? index : tokens - 1);
  const int channels = index < tokens ? static_cast<int>(p.channels()) : 0;  // a surplus token has none
  const int lane_channel = static_cast<int>(threadIdx.x) * kWidth, stride = static_cast<int>(blockDim.x) * kWidth;

  P q[kPacks], k[kPacks], v[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int channel = lane_channel + i * stride;
    const bool inside = channel < channels;
    q[i] = inside ? token.read(token.q_row, channel) : P{};
    k[i] = inside ? token.read(token.k_row, channel) : P{};
    v[i] = inside ? token.read(token.v_row, channel) : P{};
  }
  float2 turn[kWidth / 2];
  token.read_rotation(lane_channel, turn);
  token.check_slot();
  float2 sums = make_float2(0.f, 0.f);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int channel = lane_channel + i * stride;
    if (channel < channels) token.write_v(channel, v[i]);
    sums.x += sum_of_squares(q[i].value);
    sums.y += sum_of_squares(k[i].value);
  }
  sums = row_sum(sums, warp_sums);
  const float2 scales = token.scales_of(sums);
  const bool turns_alike = stride % token.head_dim == 0;  // all packs of a lane have the same place within their heads
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int channel = lane_channel + i * stride;
    if (channel >= channels) break;
    if (i > 0 && !turns_alike) token.read_rotation(channel, turn);
    token.write_q_and_k(channel, q[i], k[i], turn, scales);
  }
}

// One CTA per token, whose rows are read twice.
template <typename T, typename C, int kWidth, bool kVector>
__global__ void __launch_bounds__(kRereadThreads) kv_update_reread_kernel(const KvUpdateParams p) {
  using P = Pack<T, kWidth, kVector>;
  __shared__ float2 warp_sums[kRereadThreads / kWarpSize];
  const Token<T, C, kWidth, kVector> token(p, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x));
  const int channels = static_cast<int>(p.channels()), stride = static_cast<int>(blockDim.x) * kWidth;
  const int lane_channel = static_cast<int>(threadIdx.x) * kWidth;
  token.check_slot();
  float2 sums = make_float2(0.f, 0.f);
  for (int channel = lane_channel; channel < channels; channel += stride) {
    const P q = token.read(token.q_row, channel), k = token.read(token.k_row, channel);
    token.write_v(channel, token.read(token.v_row, channel));
    sums.x += sum_of_squares(q.value);
    sums.y += sum_of_squares(k.value);
  }
  const float2 scales = token.scales_of(row_sum(sums, warp_sums));
  for (int channel = lane_channel; channel < channels; channel += stride) {
    float2 turn[kWidth / 2];
    token.read_rotation(channel, turn);
    token.write_q_and_k(channel, token.read(token.q_row, channel), token.read(token.k_row, channel), turn, scales);
  }
}

// True if all addresses and strides of 16-byte accesses are multiples of 16 bytes; of a float8 cache, of a pack.
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

template <typename T, typename C>
void launch_for(const KvUpdateParams& p, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T), kLaneChannels = kWarpSize * kWidth;
  const auto tokens = static_cast<unsigned>(p.tokens()), batch = static_cast<unsigned>(p.batch);
  const auto warps = static_cast<int>(ceil_div<int64_t>(p.channels(), kMaxPacks * kLaneChannels));
  if (!vectors_fit(p)) {
    kv_update_reread_kernel<T, C, 2, false><<<dim3(tokens, batch), kRereadThreads, 0, stream>>>(p);
  } else if (warps > kMaxWarps) {
    kv_update_reread_kernel<T, C, kWidth, true><<<dim3(tokens, batch), kRereadThreads, 0, stream>>>(p);
  } else {
    const dim3 block(warps * kWarpSize, std::max(1, kCtaThreads / (warps * kWarpSize)));
    const dim3 grid(ceil_div(tokens, block.y), batch);
    const auto packs = static_cast<int>(ceil_div<int64_t>(p.channels(), warps * kLaneChannels));
    const auto launch = [&](auto kernel) { kernel<<<grid, block, 0, stream>>>(p); };
    if (packs == 1) {
      launch(kv_update_register_kernel<T, C, kWidth, 1>);
    } else if (packs == 2) {
      launch(kv_update_register_kernel<T, C, kWidth, 2>);
    } else {
      launch(kv_update_register_kernel<T, C, kWidth, kMaxPacks>);
    }
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

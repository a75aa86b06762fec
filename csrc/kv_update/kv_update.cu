// CUDA kernel of kv_update_. One CTA makes one token of one batch row: its q, k and v rows are read in packs (16 bytes
// a thread and access), q and k are reduced together, rotated and written, v is moved untouched. Up to 1024 packs a row
// (8192 channels in 16-bit, 4096 in float32) each thread keeps its pack in registers between the two passes; wider or
// unaligned rows are read a second time, from L1.
// What binds: bytes. 6 * H * D elements move per token (3 in, 3 out); about 20 FLOPs per element of q and k are far
// below the roof. A frame is only a few waves of CTAs, so the chain of waits within one counts: all that a thread reads
// is asked for before it waits for any of it. Norm weights and rotation tables are shared by all CTAs and stay in L2
// and L1. Assumes: D even; a head starts on a pack boundary (D % kWidth == 0); for packs of 16 bytes also that all
// pointers and strides are multiples of 16 bytes, else the launcher takes packs of 2 elements moved one by one. A
// write_index outside [0, capacity - S / groups] traps: see kv_update.h.
#include <cstring>
#include <initializer_list>

#include "common/device.cuh"
#include "kv_update/kv_update.h"

namespace cfpp {
namespace {

constexpr int kMaxThreads = 1024;
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

// Normalises and rotates one adjacent pair of channels in place.
template <typename T>
__device__ __forceinline__ void rotate(T* x, const T* weight, float scale, float2 r) {
  const float x0 = to_float(x[0]) * scale * to_float(weight[0]);
  const float x1 = to_float(x[1]) * scale * to_float(weight[1]);
  x[0] = from_float<T>(x0 * r.x - x1 * r.y);
  x[1] = from_float<T>(x0 * r.y + x1 * r.x);
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

// kHold: blockDim.x * kWidth >= H * D, so that a thread has one pack per row and keeps it in registers.
template <typename T, int kWidth, bool kVector, bool kHold>
__global__ void __launch_bounds__(kHold ? kMaxThreads : kRereadThreads) kv_update_kernel(const KvUpdateParams p) {
  using P = Pack<T, kWidth, kVector>;
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
  T* k_out = static_cast<T*>(p.k_cache_ptr) + b * p.k_cache_stride[0] + slot * p.k_cache_stride[2];
  T* v_out = static_cast<T*>(p.v_cache_ptr) + b * p.v_cache_stride[0] + slot * p.v_cache_stride[2];

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
    write_pack(v_out + head * p.v_cache_stride[1] + (channel - head * head_dim), v);
  };
  const auto write_q_and_k = [&](int channel, P q, P k, const Factors<P, kWidth>& f, float q_scale, float k_scale) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 2) {
      rotate(q.value + i, f.q_weight.value + i, q_scale, f.rotation[i / 2]);
      rotate(k.value + i, f.k_weight.value + i, k_scale, f.rotation[i / 2]);
    }
    const int head = channel / head_dim, within = channel - head * head_dim;
    write_pack(q_out + head * p.tokens() * head_dim + within, q);
    write_pack(k_out + head * p.k_cache_stride[1] + within, k);
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

// All addresses and strides that a 16-byte access would meet are multiples of 16 bytes.
bool vectors_fit(const KvUpdateParams& p) {
  const int64_t width = 16 / size_of(p.dtype);
  bool fits = p.head_dim % width == 0;
  for (const void* pointer :
       {static_cast<const void*>(p.k_cache_ptr), static_cast<const void*>(p.v_cache_ptr),
        static_cast<const void*>(p.q_out_ptr), p.q_ptr, p.k_ptr, p.v_ptr, p.q_norm_ptr, p.k_norm_ptr}) {
    fits = fits && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  }
  for (int i = 0; i < 3; ++i) fits = fits && p.k_cache_stride[i] % width == 0 && p.v_cache_stride[i] % width == 0;
  for (int i = 0; i < 2; ++i) {
    fits = fits && p.q_stride[i] % width == 0 && p.k_stride[i] % width == 0 && p.v_stride[i] % width == 0;
  }
  return fits;
}

template <typename T, int kWidth, bool kVector, bool kHold>
void launch(const KvUpdateParams& p, cudaStream_t stream) {
  const int64_t full = ceil_div<int64_t>(p.channels() / kWidth, kWarpSize) * kWarpSize;
  const int64_t threads = kHold || full < kRereadThreads ? full : kRereadThreads;
  const dim3 grid(static_cast<unsigned>(p.tokens()), static_cast<unsigned>(p.batch));
  kv_update_kernel<T, kWidth, kVector, kHold><<<grid, static_cast<unsigned>(threads), 0, stream>>>(p);
}

template <typename T>
void launch_for(const KvUpdateParams& p, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  if (!vectors_fit(p)) {
    launch<T, 2, false, false>(p, stream);
  } else if (p.channels() <= kWidth * kMaxThreads) {
    launch<T, kWidth, true, true>(p, stream);
  } else {
    launch<T, kWidth, true, false>(p, stream);
  }
}

}  // namespace

Status kv_update_cuda(const KvUpdateParams& p, int device, void* stream) {
  DeviceGuard guard(device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) {
    const auto run = [&](auto tag) { launch_for<decltype(tag)>(p, static_cast<cudaStream_t>(stream)); };
    dispatch_dtype<float, __nv_bfloat16, __half>(p.dtype, run);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? Status{} : Status("kv_update_: ") + cudaGetErrorString(error);
}

}  // namespace cfpp

// CPU kernel of kv_update_.
// One task: a token. Rows of q and k are read twice: for the sum of squares and, then from L1, to be normalised,
// rotated,
//   narrowed and written in vectors of 16.
// What binds: memory traffic, 6 * H * D elements per token. Large calls use streaming stores, so that destinations are
//   not read before they are written.
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "common/cpu.h"
#include "common/float8.h"
#include "common/half.h"
#include "common/vectors.h"
#include "kv_update/kv_update.h"

namespace cfpp {
namespace {

constexpr int kWidth = 2 * kLanes;  // channels a vector step takes

// kWidth channels: the first and the second channel of each adjacent pair.
struct Pairs {
  Floats first, second;
};

// A pair of 16-bit channels is one 32-bit element of Words, the first channel in its low half.
[[gnu::always_inline]] inline Pairs load(const bfloat16* source) {
  const Words words = read<Words>(source);
  return {bit_cast<Floats>(words << 16), bit_cast<Floats>(words & 0xffff0000u)};
}
[[gnu::always_inline]] inline Pairs load(const float16* source) {
  const Words words = read<Words>(source);
  return {bit_cast<Floats>(widen_float16<Floats>(words & 0xffffu)),
          bit_cast<Floats>(widen_float16<Floats>(words >> 16))};
}
[[gnu::always_inline]] inline Pairs load(const float* source) {
  const Floats low = read<Floats>(source), high = read<Floats>(source + kLanes);
  const Words even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return {__builtin_shuffle(low, high, even), __builtin_shuffle(low, high, even + 1)};
}

// kStream: past the caches.
template <bool kStream>
[[gnu::always_inline]] inline void store(bfloat16* target, const Pairs& x) {
  write<kStream>(target, narrow_to_bfloat16(bit_cast<Words>(x.first)) | narrow_to_bfloat16(bit_cast<Words>(x.second))
                                                                            << 16);
}
template <bool kStream>
[[gnu::always_inline]] inline void store(float16* target, const Pairs& x) {
  write<kStream>(target, narrow_to_float16<Floats>(bit_cast<Words>(x.first)) |
                             narrow_to_float16<Floats>(bit_cast<Words>(x.second)) << 16);
}
template <bool kStream>
[[gnu::always_inline]] inline void store(float* target, const Pairs& x) {
  const Words low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  write<kStream>(target, __builtin_shuffle(x.first, x.second, low));
  write<kStream>(target + kLanes, __builtin_shuffle(x.first, x.second, low + kLanes / 2));
}
template <bool kStream>
[[gnu::always_inline]] inline void store(float8* target, const Pairs& x) {
  const Words words =
      narrow_to_float8<Floats>(bit_cast<Words>(x.first)) | narrow_to_float8<Floats>(bit_cast<Words>(x.second)) << 8;
  write<kStream>(target, __builtin_convertvector(words, Shorts));
}

template <typename C>
[[gnu::always_inline]] inline C narrow(float value) {
  if constexpr (std::is_same_v<C, float8>) {
    return {static_cast<uint8_t>(narrow_to_float8<float>(bit_cast<uint32_t>(value)))};
  } else {
    return from_float<C>(value);
  }
}

template <typename T>
[[gnu::always_inline]] inline float mean_of_squares(const T* row, int64_t channels) {
  Floats sums[4] = {};  // several chains, since one would wait for each addition
  int64_t i = 0;
  for (; i + 2 * kWidth <= channels; i += 2 * kWidth) {
    const Pairs x = load(row + i), y = load(row + i + kWidth);
    sums[0] += x.first * x.first;
    sums[1] += x.second * x.second;
    sums[2] += y.first * y.first;
    sums[3] += y.second * y.second;
  }
  const Floats lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float sum = 0.f;
  for (int j = 0; j < kLanes; ++j) sum += lanes[j];
  for (; i < channels; ++i) sum += to_float(row[i]) * to_float(row[i]);
  return sum / static_cast<float>(channels);
}

// Cosine and sine of the rotation of each pair of a head, at one token.
struct Rotation {
  explicit Rotation(int64_t pairs) : cos(pairs), sin(pairs) {}
  // Sets pairs first .. first + pairs from a table of (cos, sin).
  void set(int64_t first, const float* table, int64_t pairs) {
    for (int64_t i = 0; i < pairs; ++i) {
      cos[first + i] = table[2 * i];
      sin[first + i] = table[2 * i + 1];
    }
  }
  std::vector<float> cos, sin;
};

// One row of q, k or v: all heads of one token.
struct Row {
  const void *source, *weight;  // [heads, head_dim]; v has no weight
  void* target;                 // heads lie head_stride elements apart
  int64_t heads, head_dim, head_stride;
  const float* scales;     // [heads] of float8 targets, else null
  const float *cos, *sin;  // [head_dim / 2], as in Rotation
  float eps;
};

// Factor that a head's values are multiplied by before they are narrowed to C. Only float8 has scales.
template <typename C>
[[gnu::always_inline]] inline float factor(const Row& row, int64_t head) {
  return std::is_same_v<C, float8> ? 1.f / row.scales[head] : 1.f;
}

template <bool kStream, typename T, typename C>
[[gnu::always_inline]] inline void norm_rotate(const Row& row) {
  const T *source = static_cast<const T*>(row.source), *weight = static_cast<const T*>(row.weight);
  C* target = static_cast<C*>(row.target);
  const float scale = 1.f / std::sqrt(mean_of_squares(source, row.heads * row.head_dim) + row.eps);
  for (int64_t h = 0; h < row.heads; ++h) {
    const float to_code = factor<C>(row, h);
    int64_t i = 0;
    for (; i + kWidth <= row.head_dim; i += kWidth) {
      const Pairs x = load(source + i), w = load(weight + i);
      const Floats first = x.first * scale * w.first, second = x.second * scale * w.second;
      const Floats c = read<Floats>(row.cos + i / 2), s = read<Floats>(row.sin + i / 2);
      Pairs turned{first * c - second * s, first * s + second * c};
      if constexpr (std::is_same_v<C, float8>) turned = {turned.first * to_code, turned.second * to_code};
      store<kStream>(target + i, turned);
    }
    for (; i < row.head_dim; i += 2) {
      const float first = to_float(source[i]) * scale * to_float(weight[i]);
      const float second = to_float(source[i + 1]) * scale * to_float(weight[i + 1]);
      const float c = row.cos[i / 2], s = row.sin[i / 2];
      target[i] = narrow<C>((first * c - second * s) * to_code);
      target[i + 1] = narrow<C>((first * s + second * c) * to_code);
    }
    source += row.head_dim, weight += row.head_dim, target += row.head_stride;
  }
}

// Divides each head by its scale and narrows it to float8.
template <bool kStream, typename T>
[[gnu::always_inline]] inline void quantize(const Row& row) {
  const T* source = static_cast<const T*>(row.source);
  float8* target = static_cast<float8*>(row.target);
  for (int64_t h = 0; h < row.heads; ++h, source += row.head_dim, target += row.head_stride) {
    const float to_code = factor<float8>(row, h);
    int64_t i = 0;
    for (; i + kWidth <= row.head_dim; i += kWidth) {
      const Pairs x = load(source + i);
      store<kStream>(target + i, {x.first * to_code, x.second * to_code});
    }
    for (; i < row.head_dim; ++i) target[i] = narrow<float8>(to_float(source[i]) * to_code);
  }
}

// Rows are the unit that is compiled per instruction set: the loop over tokens would be compiled with each of them.
#define CFPP_ROW_KERNELS(T)                                                             \
  CFPP_CLONES void norm_rotate_row(const Row& row, bool streaming, T, T) {              \
    streaming ? norm_rotate<true, T, T>(row) : norm_rotate<false, T, T>(row);           \
  }                                                                                     \
  CFPP_CLONES void norm_rotate_row(const Row& row, bool streaming, T, float8) {         \
    streaming ? norm_rotate<true, T, float8>(row) : norm_rotate<false, T, float8>(row); \
  }                                                                                     \
  CFPP_CLONES void copy_row(const Row& row, bool streaming, T, float8) {                \
    streaming ? quantize<true, T>(row) : quantize<false, T>(row);                       \
  }
CFPP_ROW_KERNELS(float)
CFPP_ROW_KERNELS(bfloat16)
CFPP_ROW_KERNELS(float16)
#undef CFPP_ROW_KERNELS

// Copies the bytes of each head.
template <typename T>
void copy_row(const Row& row, bool streaming, T, T) {
  const char* source = static_cast<const char*>(row.source);
  char* target = static_cast<char*>(row.target);
  const int64_t bytes = row.head_dim * static_cast<int64_t>(sizeof(T));
  for (int64_t h = 0; h < row.heads;
       ++h, source += bytes, target += row.head_stride * static_cast<int64_t>(sizeof(T))) {
    if (!streaming) {
      std::memcpy(target, source, bytes);
      continue;
    }
    for (int64_t i = 0; i < bytes; i += sizeof(Words)) write<true>(target + i, read<Words>(source + i));
  }
}

// Tokens first .. last of the B * S of a call.
template <typename T, typename C>
void update_tokens(const KvUpdateParams& p, bool streaming, int64_t first, int64_t last) {
  Rotation rotation(p.head_dim / 2);
  for (int64_t flat = first; flat < last; ++flat) {
    const int64_t b = flat / p.tokens(), s = flat % p.tokens(), group = s / p.tokens_per_group();
    const int64_t column = s % p.columns, line = s / p.columns % p.rows, frame = s / (p.columns * p.rows);
    const int64_t slot =
        p.write_index_ptr[b * p.write_index_stride[0] + group * p.write_index_stride[1]] + s % p.tokens_per_group();
    if (column == 0 || flat == first) {
      const float* time = p.rope_t_ptr + b * p.rope_t_stride[0] + frame * p.rope_t_stride[1];
      rotation.set(0, time, p.time_pairs);
      rotation.set(p.time_pairs, p.rope_h_ptr + line * 2 * p.row_pairs, p.row_pairs);
    }
    rotation.set(p.time_pairs + p.row_pairs, p.rope_w_ptr + column * 2 * p.column_pairs, p.column_pairs);

    Row row{};
    row.heads = p.heads;
    row.head_dim = p.head_dim;
    row.cos = rotation.cos.data();
    row.sin = rotation.sin.data();
    row.eps = p.eps;
    const auto read_from = [&](const void* base, const int64_t (&stride)[2]) {
      row.source = static_cast<const T*>(base) + b * stride[0] + s * stride[1];
    };
    const auto write_to_cache = [&](void* base, const int64_t (&stride)[3], const float* scales) {
      row.target = static_cast<C*>(base) + b * stride[0] + slot * stride[2];
      row.head_stride = stride[1];
      row.scales = scales == nullptr ? nullptr : scales + b * p.heads;
    };
    read_from(p.q_ptr, p.q_stride);
    row.weight = p.q_norm_ptr;
    row.target = static_cast<T*>(p.q_out_ptr) + (b * p.heads * p.tokens() + s) * p.head_dim;
    row.head_stride = p.tokens() * p.head_dim;
    norm_rotate_row(row, streaming, T{}, T{});
    read_from(p.k_ptr, p.k_stride);
    row.weight = p.k_norm_ptr;
    write_to_cache(p.k_cache_ptr, p.k_cache_stride, p.k_scale_ptr);
    norm_rotate_row(row, streaming, T{}, C{});
    read_from(p.v_ptr, p.v_stride);
    write_to_cache(p.v_cache_ptr, p.v_cache_stride, p.v_scale_ptr);
    copy_row(row, streaming, T{}, C{});
  }
  if (streaming) finish_writes<true>();
}

// True if the call is large enough for streaming stores, and every head is a multiple of vectors at a 16-byte boundary.
bool streams(const KvUpdateParams& p) {
  const int64_t bytes = size_of(p.cache_dtype);
  const int64_t written = p.batch * p.tokens() * p.channels() * (size_of(p.dtype) + 2 * bytes);
  bool fits = written > kStreamBytes && p.head_dim % kWidth == 0;
  for (const void* pointer : {p.k_cache_ptr, p.v_cache_ptr, p.q_out_ptr}) {
    fits = fits && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  }
  for (int i = 0; i < 3; ++i) {
    fits = fits && p.k_cache_stride[i] * bytes % 16 == 0 && p.v_cache_stride[i] * bytes % 16 == 0;
  }
  return fits;
}

Status check_write_index(const KvUpdateParams& p) {
  const int64_t last = p.capacity - p.tokens_per_group();
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t first = p.write_index_ptr[b * p.write_index_stride[0] + g * p.write_index_stride[1]];
      if (first < 0 || first > last) {
        return "kv_update_: write_index[" + std::to_string(b) + ", " + std::to_string(g) + "] must be in 0.." +
               std::to_string(last) + " (capacity " + std::to_string(p.capacity) + " minus " +
               std::to_string(p.tokens_per_group()) + " tokens of a group), got " + std::to_string(first);
      }
    }
  }
  return {};
}

Status check_scales(const KvUpdateParams& p) {
  if (p.cache_dtype != DType::kFloat8E4M3) return {};
  for (int64_t i = 0; i < p.batch * p.heads; ++i) {
    for (const float* scales : {p.k_scale_ptr, p.v_scale_ptr}) {
      if (!(scales[i] > 0.f && std::isnormal(scales[i]) && std::isnormal(1.f / scales[i]))) {
        return std::string("kv_update_: ") + (scales == p.k_scale_ptr ? "k" : "v") + "_scale[" +
               std::to_string(i / p.heads) + ", " + std::to_string(i % p.heads) + "] must be in 2^-126..2^126, got " +
               std::to_string(scales[i]);
      }
    }
  }
  return {};
}

}  // namespace

Status kv_update_cpu(const KvUpdateParams& params, int num_threads) {
  Status status = check_write_index(params);
  if (status.empty()) status = check_scales(params);
  if (status.empty()) {
    const bool streaming = streams(params);
    dispatch_dtype<float, bfloat16, float16>(params.dtype, [&](auto tag) {
      using T = decltype(tag);
      const auto update = params.cache_dtype == DType::kFloat8E4M3 ? update_tokens<T, float8> : update_tokens<T, T>;
      parallel_for(params.batch * params.tokens(), 3 * params.channels(), num_threads,
                   [&](int64_t first, int64_t last) { update(params, streaming, first, last); });
    });
  }
  return status;
}

}  // namespace cfpp

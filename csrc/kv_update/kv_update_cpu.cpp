// CPU kernel of kv_update_. Threads share the tokens. A row of q or k is read twice, for the sum of squares and, then
// from L1, to be normalised, rotated, narrowed and written in vectors of 16. What binds is memory traffic: 6 * H * D
// elements a token, and for large calls no more, since streaming stores keep the destinations from being read first.
#pragma GCC diagnostic ignored "-Wpsabi"

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

// kWidth channels: the first and the second of each adjacent pair.
struct Pairs {
  Floats first, second;
};

// A pair of 16-bit channels is one word, the first channel in its low half.
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

// The turn of each pair of a head at one token.
struct Rotation {
  explicit Rotation(int64_t pairs) : cos(pairs), sin(pairs) {}
  // Sets `pairs` of them from `first` on from a table of (cos, sin).
  void set(int64_t first, const float* table, int64_t pairs) {
    for (int64_t i = 0; i < pairs; ++i) {
      cos[first + i] = table[2 * i];
      sin[first + i] = table[2 * i + 1];
    }
  }
  std::vector<float> cos, sin;
};

// What a head's values are multiplied with before they are narrowed to C. float8 alone has scales, [H] of this batch
// row.
template <typename C>
[[gnu::always_inline]] inline float factor([[maybe_unused]] const float* scales, [[maybe_unused]] int64_t head) {
  if constexpr (std::is_same_v<C, float8>) return 1.f / scales[head];
  return 1.f;
}

template <bool kStream, typename T, typename C>
[[gnu::always_inline]] inline void norm_rotate(const KvUpdateParams& p, const T* row, const T* weight,
                                               const Rotation& rotation, C* target, int64_t head_stride,
                                               const float* scales) {
  const float scale = 1.f / std::sqrt(mean_of_squares(row, p.channels()) + p.eps);
  const float *cos = rotation.cos.data(), *sin = rotation.sin.data();
  for (int64_t h = 0; h < p.heads; ++h, row += p.head_dim, weight += p.head_dim, target += head_stride) {
    const float to_code = factor<C>(scales, h);
    int64_t i = 0;
    for (; i + kWidth <= p.head_dim; i += kWidth) {
      const Pairs x = load(row + i), w = load(weight + i);
      const Floats first = x.first * scale * w.first, second = x.second * scale * w.second;
      const Floats c = read<Floats>(cos + i / 2), s = read<Floats>(sin + i / 2);
      Pairs turned{first * c - second * s, first * s + second * c};
      if constexpr (std::is_same_v<C, float8>) turned = {turned.first * to_code, turned.second * to_code};
      store<kStream>(target + i, turned);
    }
    for (; i < p.head_dim; i += 2) {
      const float first = to_float(row[i]) * scale * to_float(weight[i]);
      const float second = to_float(row[i + 1]) * scale * to_float(weight[i + 1]);
      target[i] = narrow<C>((first * cos[i / 2] - second * sin[i / 2]) * to_code);
      target[i + 1] = narrow<C>((first * sin[i / 2] + second * cos[i / 2]) * to_code);
    }
  }
}

// One head's values: bytes as they are, or divided by the head's scale and narrowed.
template <bool kStream, typename T>
[[gnu::always_inline]] inline void copy(const T* source, int64_t count, const float*, int64_t, T* target) {
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  if (!kStream) {
    std::memcpy(target, source, bytes);
    return;
  }
  char* to = reinterpret_cast<char*>(target);
  for (int64_t i = 0; i < bytes; i += sizeof(Words)) {
    write<kStream>(to + i, read<Words>(reinterpret_cast<const char*>(source) + i));
  }
}
template <bool kStream, typename T>
[[gnu::always_inline]] inline void copy(const T* source, int64_t count, const float* scales, int64_t head,
                                        float8* target) {
  const float to_code = factor<float8>(scales, head);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Pairs x = load(source + i);
    store<kStream>(target + i, {x.first * to_code, x.second * to_code});
  }
  for (; i < count; ++i) target[i] = narrow<float8>(to_float(source[i]) * to_code);
}

// Tokens first .. last of the B * S of a call.
template <bool kStream, typename T, typename C>
[[gnu::always_inline]] inline void update_tokens(const KvUpdateParams& p, int64_t first, int64_t last) {
  Rotation rotation(p.head_dim / 2);
  for (int64_t flat = first; flat < last; ++flat) {
    const int64_t b = flat / p.tokens(), s = flat % p.tokens(), group = s / p.tokens_per_group();
    const int64_t column = s % p.columns, row = s / p.columns % p.rows, frame = s / (p.columns * p.rows);
    const int64_t slot =
        p.write_index_ptr[b * p.write_index_stride[0] + group * p.write_index_stride[1]] + s % p.tokens_per_group();
    if (column == 0 || flat == first) {
      const float* time = p.rope_t_ptr + b * p.rope_t_stride[0] + frame * p.rope_t_stride[1];
      rotation.set(0, time, p.time_pairs);
      rotation.set(p.time_pairs, p.rope_h_ptr + row * 2 * p.row_pairs, p.row_pairs);
    }
    rotation.set(p.time_pairs + p.row_pairs, p.rope_w_ptr + column * 2 * p.column_pairs, p.column_pairs);

    const T* q = static_cast<const T*>(p.q_ptr) + b * p.q_stride[0] + s * p.q_stride[1];
    const T* k = static_cast<const T*>(p.k_ptr) + b * p.k_stride[0] + s * p.k_stride[1];
    const T* v = static_cast<const T*>(p.v_ptr) + b * p.v_stride[0] + s * p.v_stride[1];
    T* q_out = static_cast<T*>(p.q_out_ptr) + (b * p.heads * p.tokens() + s) * p.head_dim;
    C* k_out = static_cast<C*>(p.k_cache_ptr) + b * p.k_cache_stride[0] + slot * p.k_cache_stride[2];
    C* v_out = static_cast<C*>(p.v_cache_ptr) + b * p.v_cache_stride[0] + slot * p.v_cache_stride[2];
    const auto of_row = [&](const float* scales) { return scales == nullptr ? nullptr : scales + b * p.heads; };
    norm_rotate<kStream>(p, q, static_cast<const T*>(p.q_norm_ptr), rotation, q_out, p.tokens() * p.head_dim, nullptr);
    norm_rotate<kStream>(p, k, static_cast<const T*>(p.k_norm_ptr), rotation, k_out, p.k_cache_stride[1],
                         of_row(p.k_scale_ptr));
    for (int64_t h = 0; h < p.heads; ++h) {
      copy<kStream>(v + h * p.head_dim, p.head_dim, of_row(p.v_scale_ptr), h, v_out + h * p.v_cache_stride[1]);
    }
  }
  finish_writes<kStream>();
}

template <typename T>
[[gnu::always_inline]] inline void update_tokens(const KvUpdateParams& p, bool streaming, int64_t first, int64_t last) {
  if (p.cache_dtype == DType::kFloat8E4M3) {
    streaming ? update_tokens<true, T, float8>(p, first, last) : update_tokens<false, T, float8>(p, first, last);
  } else {
    streaming ? update_tokens<true, T, T>(p, first, last) : update_tokens<false, T, T>(p, first, last);
  }
}

CFPP_CLONES void update(const KvUpdateParams& p, bool s, int64_t a, int64_t b, float) {
  update_tokens<float>(p, s, a, b);
}
CFPP_CLONES void update(const KvUpdateParams& p, bool s, int64_t a, int64_t b, bfloat16) {
  update_tokens<bfloat16>(p, s, a, b);
}
CFPP_CLONES void update(const KvUpdateParams& p, bool s, int64_t a, int64_t b, float16) {
  update_tokens<float16>(p, s, a, b);
}

// Large enough to stream, and every head a whole number of vectors at an address that streaming stores take.
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
      parallel_for(params.batch * params.tokens(), 3 * params.channels(), num_threads,
                   [&](int64_t first, int64_t last) { update(params, streaming, first, last, tag); });
    });
  }
  return status;
}

}  // namespace cfpp

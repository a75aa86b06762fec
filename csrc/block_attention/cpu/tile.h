// Flash attention on the CPU with queries in the vector lanes. Included by one translation unit per instruction set,
// which defines `Simd` (see cpu/avx512.cpp) and compiles this file for its target.
//
// A register tile is kVecs vectors of queries times kRows accumulators each; both products are
//     acc[row][query] += word(row, step) broadcast * panel[step][query]
// with a row a key and a step a slice of D for the logits, a row a channel and a step a token for the output. So
//   - softmax runs down the lanes: no horizontal maximum or sum, no mask for a ragged number of keys;
//   - q is transposed once per tile of queries and the output back at its end, each O(queries * D);
//   - keys are broadcast from where they lie in the cache, and only values are copied, once per KV tile.
// A word is 32 bits: one float, or a pair of bfloat16 neighbours in D (logits) or in time (output).
//
// What binds: the FMA rate. Per token and register tile 2 * D * kVecs FMAs against some 11 vector operations of
// softmax per kVecs. The logits of a KV tile (kTokens * kWidth floats, 24 KiB with AVX-512; bfloat16 weights take half)
// stay in L1 while the values of a few channels stream past them; q, the output and the values of a tile stay in L2.
//
// A query's bits depend on its own ranges only: neither tile size nor thread count changes the order of any sum.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "block_attention/cpu/kernel.h"
#include "common/half.h"

#define CFPP_INLINE [[gnu::always_inline]] static inline

namespace cfpp {
namespace {

constexpr int kMaxVecs = 3;
constexpr int64_t kTokens = 128;  // of a KV tile
constexpr int64_t kPanel = 16;    // channels of a packed panel of values: one cache line of words

// 2^f for |f| <= 1/2; minimax of degree 6, relative error 8e-8 with its roundings, and 1 at 0.
template <typename Simd>
CFPP_INLINE typename Simd::Vec exp2_fraction(typename Simd::Vec f) {
  auto p = Simd::fma(Simd::set(1.534581243e-4f), f, Simd::set(1.339993090e-3f));
  p = Simd::fma(p, f, Simd::set(9.618489072e-3f));
  p = Simd::fma(p, f, Simd::set(5.550328642e-2f));
  p = Simd::fma(p, f, Simd::set(2.402264625e-1f));
  p = Simd::fma(p, f, Simd::set(6.931471825e-1f));
  return Simd::fma(p, f, Simd::set(1.f));
}

CFPP_INLINE uint32_t load_word(const char* address) {
  uint32_t word;
  std::memcpy(&word, address, sizeof word);
  return word;
}

// T is the type of the tensors, kPack how many of its elements one word takes: 2 multiplies bfloat16 as it is, 1 widens
// to float first.
template <typename Simd, typename T, int kPack>
class AttentionTile {
  static_assert(kPack == 1 || (kPack == 2 && sizeof(T) == 2));
  using Vec = typename Simd::Vec;
  static constexpr int kLanes = Simd::kLanes, kRows = Simd::kRows;
  // Steps of a logit that are summed in one go: partial sums of floats err less than one chain over D.
  static constexpr int64_t kSlice = kPack == 2 ? 64 : 32;
  static constexpr bool kWordsInCache = sizeof(T) * kPack == sizeof(uint32_t);  // keys need no widening

 public:
  static constexpr int64_t kWidth = kMaxVecs * kLanes;  // queries of a register tile

  static size_t scratch_bytes(const BlockAttentionParams& p, int64_t queries) {
    return layout(p, queries, nullptr).bytes;
  }

  static void run(const BlockAttentionParams& p, const QueryTile& tile, void* scratch) {
    const Scratch s = layout(p, tile.count, static_cast<char*>(scratch));
    pack_queries(p, tile, s);
    const int32_t* range = p.ranges_ptr + (tile.batch * p.groups + tile.group) * p.ranges * 2;
    for (int64_t r = 0; r < p.ranges; ++r, range += 2) {
      const int64_t length = range[1] - range[0];
      if (length == 0) continue;
      const int64_t span = round_up(ceil_div(length, ceil_div(length, kTokens)), 2 * kRows);  // equal tiles
      for (int64_t first = range[0]; first < range[1]; first += span) {
        const int64_t count = range[1] - first < span ? range[1] - first : span;
        const Keys keys = locate_keys(p, tile, first, count, s);
        pack_values(p, tile, first, count, s);
        for (int64_t query = 0; query < tile.count; query += kWidth) {
          const int64_t vecs = ceil_div(tile.count - query, kLanes);
          if (vecs >= 3) {
            attend<3>(p, keys, query, s);
          } else if (vecs == 2) {
            attend<2>(p, keys, query, s);
          } else {
            attend<1>(p, keys, query, s);
          }
        }
      }
    }
    write_output(p, tile, s);
  }

 private:
  // steps: words of a key. Register tiles of queries follow each other in query, out, peak and sum.
  struct Scratch {
    uint32_t* query;   // [tiles, steps, kWidth]
    float* out;        // [tiles, panels * kPanel, kWidth], unnormalised
    float* peak;       // [tiles, kWidth], running maximum of the products q k
    float* sum;        // [tiles, kWidth], of the weights
    uint32_t* logits;  // [kTokens, kWidth], then in place the weights [kTokens / kPack, kWidth]
    uint32_t* values;  // [panels, kTokens / kPack, kPanel]
    float* keys;       // [kTokens, D] if they need widening
    float* row;        // [D]
    int64_t steps, panels;
    size_t bytes;
  };

  struct Keys {
    const char* rows;
    int64_t stride, count;  // stride in bytes
  };

  static Scratch layout(const BlockAttentionParams& p, int64_t queries, char* base) {
    Scratch s{};
    const auto take = [&](auto*& pointer, int64_t words) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + s.bytes);
      s.bytes += static_cast<size_t>(round_up(words * 4, 64));
    };
    const int64_t tiles = ceil_div(queries, kWidth);
    s.steps = p.head_dim / kPack;
    s.panels = ceil_div(p.head_dim, kPanel);
    take(s.query, tiles * s.steps * kWidth);
    take(s.out, tiles * s.panels * kPanel * kWidth);
    take(s.peak, tiles * kWidth);
    take(s.sum, tiles * kWidth);
    take(s.logits, kTokens * kWidth);
    take(s.values, s.panels * kTokens / kPack * kPanel);
    take(s.keys, kWordsInCache ? 0 : kTokens * p.head_dim);
    take(s.row, p.head_dim);
    return s;
  }

  static const T* row_of(const void* base, const int64_t (&stride)[3], const QueryTile& tile, int64_t token) {
    return static_cast<const T*>(base) + tile.batch * stride[0] + tile.head * stride[1] + token * stride[2];
  }

  // Transposes q to lanes. A negative scale moves into its signs, so that the largest product is the largest logit.
  static void pack_queries(const BlockAttentionParams& p, const QueryTile& tile, const Scratch& s) {
    const uint32_t flip = p.scale >= 0.f ? 0u : kPack == 2 ? 0x80008000u : 0x80000000u;
    const int64_t tiles = ceil_div(tile.count, kWidth);
    std::memset(s.out, 0, tiles * s.panels * kPanel * kWidth * sizeof(float));
    for (int64_t i = 0; i < tiles * kWidth; ++i) {
      s.peak[i] = std::numeric_limits<float>::lowest();
      s.sum[i] = 0.f;
      uint32_t* target = s.query + i / kWidth * s.steps * kWidth + i % kWidth;
      if (i >= tile.count) {
        for (int64_t step = 0; step < s.steps; ++step) target[step * kWidth] = 0u;
        continue;
      }
      const T* source = row_of(p.q_ptr, p.q_stride, tile, tile.first + i);
      for (int64_t step = 0; step < s.steps; ++step) {
        if constexpr (kPack == 2) {
          target[step * kWidth] = load_word(reinterpret_cast<const char*>(source + 2 * step)) ^ flip;
        } else {
          target[step * kWidth] = bit_cast<uint32_t>(to_float(source[step])) ^ flip;
        }
      }
    }
  }

  static Keys locate_keys(const BlockAttentionParams& p, const QueryTile& tile, int64_t first, int64_t count,
                          const Scratch& s) {
    const T* rows = row_of(p.k_ptr, p.k_stride, tile, first);
    if constexpr (kWordsInCache) {
      return {reinterpret_cast<const char*>(rows), p.k_stride[2] * static_cast<int64_t>(sizeof(T)), count};
    } else {
      for (int64_t t = 0; t < count; ++t) widen(rows + t * p.k_stride[2], p.head_dim, s.keys + t * p.head_dim);
      return {reinterpret_cast<const char*>(s.keys), p.head_dim * 4, count};
    }
  }

  CFPP_INLINE void widen(const T* __restrict__ source, int64_t count, float* __restrict__ target) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) target[i] = to_float(source[i]);
  }

  // Words of channel c: token t, or the tokens 2t (low half) and 2t + 1 (high half; 0 where there is none).
  static void pack_values(const BlockAttentionParams& p, const QueryTile& tile, int64_t first, int64_t count,
                          const Scratch& s) {
    const int64_t steps = ceil_div(count, kPack);
    for (int64_t step = 0; step < steps; ++step) {
      const T* low = row_of(p.v_ptr, p.v_stride, tile, first + step * kPack);
      const T* high = step * kPack + 1 < count ? low + p.v_stride[2] : nullptr;
      uint32_t* target = s.values + step * kPanel;
      for (int64_t c = 0; c < p.head_dim; c += kPanel, target += steps * kPanel) {
        if (c + kPanel <= p.head_dim) {
          value_words(low + c, high ? high + c : nullptr, kPanel, target);
        } else {
          std::memset(target, 0, kPanel * sizeof(uint32_t));
          value_words(low + c, high ? high + c : nullptr, p.head_dim - c, target);
        }
      }
    }
  }

  CFPP_INLINE void value_words(const T* __restrict__ low, [[maybe_unused]] const T* __restrict__ high, int64_t count,
                               uint32_t* __restrict__ target) {
    if constexpr (kPack == 1) {
      for (int64_t i = 0; i < count; ++i) target[i] = bit_cast<uint32_t>(to_float(low[i]));
    } else if (high) {
      for (int64_t i = 0; i < count; ++i) target[i] = low[i].bits | static_cast<uint32_t>(high[i].bits) << 16;
    } else {
      for (int64_t i = 0; i < count; ++i) target[i] = low[i].bits;
    }
  }

  // acc[row][vec] = sum over steps of rows[row][step] * panel[step][vec]; kStride in words.
  template <int kVecs, int kStride>
  CFPP_INLINE void multiply(const char* const (&rows)[kRows], const uint32_t* panel, int64_t steps,
                            Vec (&acc)[kRows][kVecs]) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 3
      for (int vec = 0; vec < kVecs; ++vec) acc[row][vec] = Simd::set(0.f);
    }
    for (int64_t step = 0; step < steps; ++step, panel += kWidth) {
      Vec lanes[kVecs];
#pragma GCC unroll 3
      for (int vec = 0; vec < kVecs; ++vec) lanes[vec] = Simd::load(panel + vec * kLanes);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const Vec word = Simd::set(bit_cast<float>(load_word(rows[row] + step * kStride * 4)));
#pragma GCC unroll 3
        for (int vec = 0; vec < kVecs; ++vec) {
          if constexpr (kPack == 2) {
            acc[row][vec] = Simd::dot_pairs(acc[row][vec], word, lanes[vec]);
          } else {
            acc[row][vec] = Simd::fma(word, lanes[vec], acc[row][vec]);
          }
        }
      }
    }
  }

  // One KV tile for the register tile of queries that begins at `query`.
  template <int kVecs>
  static void attend(const BlockAttentionParams& p, const Keys& keys, int64_t query, const Scratch& s) {
    float* peak = s.peak + query;
    float* sum = s.sum + query;
    float* out = s.out + query * s.panels * kPanel;
    uint32_t* logits = s.logits;
    const Vec scale = Simd::set(static_cast<float>(std::fabs(p.scale) * 1.4426950408889634));  // of 2^x

    Vec top[kVecs];
    for (Vec& vec : top) vec = Simd::set(std::numeric_limits<float>::lowest());
    for (int64_t t = 0; t < keys.count; t += kRows) {
      const char* rows[kRows];
      // The last key stands in for those past the end: it changes no maximum, and the weights skip the copies.
#pragma GCC unroll 8
      for (int64_t i = 0; i < kRows; ++i) {
        rows[i] = keys.rows + (t + i < keys.count ? t + i : keys.count - 1) * keys.stride;
      }
      for (int64_t slice = 0; slice < s.steps; slice += kSlice) {
        const int64_t steps = s.steps - slice < kSlice ? s.steps - slice : kSlice;
        Vec acc[kRows][kVecs];
        multiply<kVecs, 1>(rows, s.query + (query / kWidth * s.steps + slice) * kWidth, steps, acc);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
          uint32_t* target = logits + (t + row) * kWidth;
#pragma GCC unroll 3
          for (int vec = 0; vec < kVecs; ++vec) {
            Vec x = acc[row][vec];
            if (slice > 0) x = Simd::add(Simd::load(target + vec * kLanes), x);
            Simd::store(target + vec * kLanes, x);
            if (slice + kSlice >= s.steps) top[vec] = Simd::max(top[vec], x);
          }
        }
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) rows[row] += steps * sizeof(uint32_t);
      }
    }

    Vec decay[kVecs];
#pragma GCC unroll 3
    for (int vec = 0; vec < kVecs; ++vec) {
      const Vec before = Simd::load(peak + vec * kLanes);
      const Vec after = Simd::max(before, top[vec]);
      Simd::store(peak + vec * kLanes, after);
      decay[vec] = Simd::exp2(Simd::mul(Simd::sub(before, after), scale));
      const Vec total = weigh(logits + vec * kLanes, keys.count, scale, after);
      Simd::store(sum + vec * kLanes, Simd::fma(Simd::load(sum + vec * kLanes), decay[vec], total));
    }

    const int64_t steps = ceil_div(keys.count, kPack);
    for (int64_t c = 0; c < p.head_dim; c += kRows) {
      const uint32_t* values = s.values + c / kPanel * steps * kPanel + c % kPanel;
      const char* rows[kRows];
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) rows[row] = reinterpret_cast<const char*>(values + row);
      Vec acc[kRows][kVecs];
      multiply<kVecs, kPanel>(rows, logits, steps, acc);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 3
        for (int vec = 0; vec < kVecs; ++vec) {
          float* target = out + (c + row) * kWidth + vec * kLanes;
          Simd::store(target, Simd::fma(Simd::load(target), decay[vec], acc[row][vec]));
        }
      }
    }
  }

  // Logits of one vector of queries to weights, in place; returns their sum.
  CFPP_INLINE Vec weigh(uint32_t* column, int64_t count, Vec scale, Vec peak) {
    const auto weight = [&](int64_t t) __attribute__((always_inline)) {
      return Simd::exp2(Simd::mul(Simd::sub(Simd::load(column + t * kWidth), peak), scale));
    };
    Vec total = Simd::set(0.f);
    if constexpr (kPack == 2) {
      int64_t t = 0;
      for (; t + 1 < count; t += 2) {
        const Vec low = weight(t), high = weight(t + 1);
        total = Simd::add(total, Simd::add(low, high));
        Simd::store(column + t / 2 * kWidth, Simd::pair(low, high));
      }
      if (t < count) {
        const Vec low = weight(t);
        total = Simd::add(total, low);
        Simd::store(column + t / 2 * kWidth, Simd::pair(low, Simd::set(0.f)));
      }
    } else {
      for (int64_t t = 0; t < count; ++t) {
        const Vec w = weight(t);
        total = Simd::add(total, w);
        Simd::store(column + t * kWidth, w);
      }
    }
    return total;
  }

  static void write_output(const BlockAttentionParams& p, const QueryTile& tile, const Scratch& s) {
    for (int64_t i = 0; i < tile.count; ++i) {
      const float* source = s.out + i / kWidth * s.panels * kPanel * kWidth + i % kWidth;
      const int64_t row = (tile.batch * p.queries + tile.first + i) * p.heads + tile.head;
      T* target = static_cast<T*>(p.out_ptr) + row * p.head_dim;
      for (int64_t c = 0; c < p.head_dim; ++c) s.row[c] = source[c * kWidth] / s.sum[i];
      for (int64_t c = 0; c < p.head_dim; ++c) target[c] = from_float<T>(s.row[c]);
    }
  }
};

template <typename Simd, typename T, int kPack>
BlockAttentionKernel attention_kernel() {
  using Tile = AttentionTile<Simd, T, kPack>;
  return {Tile::kWidth, &Tile::scratch_bytes, &Tile::run};
}

template <typename Simd>
BlockAttentionKernel attention_kernel(DType dtype) {
  return dispatch_dtype<float, bfloat16, float16>(dtype,
                                                  [](auto tag) { return attention_kernel<Simd, decltype(tag), 1>(); });
}

}  // namespace
}  // namespace cfpp

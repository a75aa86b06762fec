// CPU kernel of kv_dequantize_.
// One task: a run of visible rows, each row once even if several groups see it.
// What binds: memory traffic, 1 byte in and 2 or 4 out per element. Large calls store past the caches.
#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "common/cpu.h"
#include "common/float8.h"
#include "common/half.h"
#include "common/token_ranges.h"
#include "common/vectors.h"
#include "kv_dequantize/kv_dequantize.h"

namespace cfpp {
namespace {

// The largest finite number.
constexpr float largest(float) { return std::numeric_limits<float>::max(); }
constexpr float largest(bfloat16) { return 0x1.fep127f; }
constexpr float largest(float16) { return 65504.f; }

template <bool kStream>
[[gnu::always_inline]] inline void store(float* target, const Floats& x) {
  write<kStream>(target, x);
}
template <bool kStream>
[[gnu::always_inline]] inline void store(bfloat16* target, const Floats& x) {
  write<kStream>(target, __builtin_convertvector(narrow_to_bfloat16(bit_cast<Words>(x)), Shorts));
}
template <bool kStream>
[[gnu::always_inline]] inline void store(float16* target, const Floats& x) {
  write<kStream>(target, __builtin_convertvector(narrow_to_float16<Floats>(bit_cast<Words>(x)), Shorts));
}

// One row of one head.
struct Row {
  const uint8_t* codes;  // [size]
  void* out;             // [size]
  float scale;
  int64_t size;
};

template <bool kStream, typename T>
[[gnu::always_inline]] inline void widen(const Row& row) {
  const float limit = largest(T{});
  const Floats top = Floats{} + limit;
  T* out = static_cast<T*>(row.out);
  int64_t i = 0;
  for (; i + kLanes <= row.size; i += kLanes) {
    const Words codes = __builtin_convertvector(read<Bytes>(row.codes + i), Words);
    Floats x = bit_cast<Floats>(widen_float8<Floats>(codes)) * row.scale;
    x = x > top ? top : x;  // NaN compares false and stays
    x = x < -top ? -top : x;
    store<kStream>(out + i, x);
  }
  for (; i < row.size; ++i) {
    const float x = bit_cast<float>(widen_float8<float, uint32_t>(row.codes[i])) * row.scale;
    out[i] = from_float<T>(x > limit ? limit : x < -limit ? -limit : x);
  }
}

// Rows of one head of one batch row that are visible, [first, last), and how many visible rows come before them.
struct Run {
  int64_t batch, head, first, last, before;
};

template <bool kStream, typename T>
[[gnu::always_inline]] inline void widen_runs(const KvDequantizeParams& p, const std::vector<Run>& runs, int64_t begin,
                                              int64_t end) {
  for (const Run& run : runs) {
    const int64_t from = std::max(run.first, run.first + begin - run.before);
    const int64_t to = std::min(run.last, run.first + end - run.before);
    for (int64_t token = from; token < to; ++token) {
      const auto at = [&](const int64_t (&stride)[3]) {
        return run.batch * stride[0] + run.head * stride[1] + token * stride[2];
      };
      const int64_t scale = run.batch * p.heads + run.head;
      widen<kStream, T>({p.k_cache_ptr + at(p.k_cache_stride), static_cast<T*>(p.k_out_ptr) + at(p.k_out_stride),
                         p.k_scale_ptr[scale], p.head_dim});
      widen<kStream, T>({p.v_cache_ptr + at(p.v_cache_stride), static_cast<T*>(p.v_out_ptr) + at(p.v_out_stride),
                         p.v_scale_ptr[scale], p.head_dim});
    }
  }
  finish_writes<kStream>();
}

// Widens rows begin .. end, counted over all `runs`.
template <typename T>
[[gnu::always_inline]] inline void widen_rows(const KvDequantizeParams& p, const std::vector<Run>& runs, bool streaming,
                                              int64_t begin, int64_t end) {
  streaming ? widen_runs<true, T>(p, runs, begin, end) : widen_runs<false, T>(p, runs, begin, end);
}

using Runs = std::vector<Run>;
CFPP_CLONES void widen(const KvDequantizeParams& p, const Runs& runs, bool s, int64_t a, int64_t b, float) {
  widen_rows<float>(p, runs, s, a, b);
}
CFPP_CLONES void widen(const KvDequantizeParams& p, const Runs& runs, bool s, int64_t a, int64_t b, bfloat16) {
  widen_rows<bfloat16>(p, runs, s, a, b);
}
CFPP_CLONES void widen(const KvDequantizeParams& p, const Runs& runs, bool s, int64_t a, int64_t b, float16) {
  widen_rows<float16>(p, runs, s, a, b);
}

// True if every head is a multiple of vectors at a 16-byte boundary, as streaming stores require.
bool can_stream(const KvDequantizeParams& p) {
  const int64_t bytes = size_of(p.dtype);
  bool fits = p.head_dim % kLanes == 0;
  for (const void* pointer : {p.k_out_ptr, p.v_out_ptr}) fits = fits && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  for (int i = 0; i < 3; ++i) {
    fits = fits && p.k_out_stride[i] * bytes % 16 == 0 && p.v_out_stride[i] * bytes % 16 == 0;
  }
  return fits;
}

// Returns the rows that any group sees, in order and without overlap, for every head.
Runs find_runs(const KvDequantizeParams& p) {
  Runs runs;
  int64_t before = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    std::vector<std::pair<int64_t, int64_t>> seen;
    const int32_t* ranges = p.ranges_ptr + b * p.groups * p.ranges * 2;
    for (int64_t i = 0; i < p.groups * p.ranges; ++i) seen.emplace_back(ranges[2 * i], ranges[2 * i + 1]);
    std::sort(seen.begin(), seen.end());
    for (int64_t h = 0; h < p.heads; ++h) {
      int64_t end = 0;
      for (const auto& [first, last] : seen) {
        const int64_t from = std::max(first, end);
        if (from >= last) continue;
        runs.push_back({b, h, from, last, before});
        before += last - from;
        end = last;
      }
    }
  }
  return runs;
}

}  // namespace

Status kv_dequantize_cpu(const KvDequantizeParams& params, int num_threads) {
  Status status =
      find_bad_range("kv_dequantize_", params.ranges_ptr, params.batch, params.groups, params.ranges, params.capacity);
  if (!status.empty()) return status;
  const Runs runs = find_runs(params);
  const int64_t rows = runs.empty() ? 0 : runs.back().before + runs.back().last - runs.back().first;
  const bool streaming = 2 * rows * params.head_dim * size_of(params.dtype) > kStreamBytes && can_stream(params);
  dispatch_dtype<float, bfloat16, float16>(params.dtype, [&](auto tag) {
    parallel_for(rows, 2 * params.head_dim, num_threads,
                 [&](int64_t first, int64_t last) { widen(params, runs, streaming, first, last, tag); });
  });
  return status;
}

}  // namespace cfpp

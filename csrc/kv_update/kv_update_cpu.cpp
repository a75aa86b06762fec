// CPU kernel of kv_update_. One task per token: the row is widened to float in an L1-sized buffer, normalised and
// rotated there, and narrowed once into its destination. What binds is memory traffic, so a row is read and written
// once.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/half.h"
#include "kv_update/kv_update.h"

// The row function is compiled per instruction set and chosen at load time; elsewhere the plain build serves.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CFPP_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CFPP_CLONES
#endif

namespace cfpp {
namespace {

struct Row {
  const void* source;     // [heads * head_dim]
  const float* weight;    // [heads * head_dim]
  const float* rotation;  // [head_dim / 2, 2], (cos, sin) of this token
  float* buffer;          // [heads * head_dim] scratch
  char* target;           // first head's head_dim elements
  int64_t head_stride;    // between heads of target, in elements
  int64_t heads, head_dim;
  float eps;
};

template <typename T>
[[gnu::always_inline]] inline void norm_rotate(const Row& row) {
  const int64_t channels = row.heads * row.head_dim;
  const T* __restrict__ source = static_cast<const T*>(row.source);
  float* __restrict__ buffer = row.buffer;
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < channels; ++i) {
    const float x = to_float(source[i]);
    buffer[i] = x;
    sum += x * x;
  }
  const float scale = 1.f / std::sqrt(sum / static_cast<float>(channels) + row.eps);
  const float* __restrict__ rotation = row.rotation;
  for (int64_t h = 0; h < row.heads; ++h) {
    float* __restrict__ x = buffer + h * row.head_dim;
    const float* __restrict__ weight = row.weight + h * row.head_dim;
#pragma omp simd
    for (int64_t i = 0; i < row.head_dim; i += 2) {
      const float x0 = x[i] * scale * weight[i];
      const float x1 = x[i + 1] * scale * weight[i + 1];
      x[i] = x0 * rotation[i] - x1 * rotation[i + 1];
      x[i + 1] = x0 * rotation[i + 1] + x1 * rotation[i];
    }
    T* __restrict__ target = reinterpret_cast<T*>(row.target) + h * row.head_stride;
#pragma omp simd
    for (int64_t i = 0; i < row.head_dim; ++i) target[i] = from_float<T>(x[i]);
  }
}

CFPP_CLONES void norm_rotate_row(const Row& row, float) { norm_rotate<float>(row); }
CFPP_CLONES void norm_rotate_row(const Row& row, bfloat16) { norm_rotate<bfloat16>(row); }
CFPP_CLONES void norm_rotate_row(const Row& row, float16) { norm_rotate<float16>(row); }

template <typename T>
std::vector<float> widen(const void* weight, int64_t count) {
  std::vector<float> result(count);
  for (int64_t i = 0; i < count; ++i) result[i] = to_float(static_cast<const T*>(weight)[i]);
  return result;
}

// Where token s of batch row b lies in the three axes and in the cache.
struct Token {
  int64_t batch, index, frame, row, column, cache_index;
};

Token locate(const KvUpdateParams& p, int64_t flat) {
  Token t{};
  t.batch = flat / p.tokens();
  t.index = flat % p.tokens();
  t.column = t.index % p.columns;
  t.row = t.index / p.columns % p.rows;
  t.frame = t.index / (p.columns * p.rows);
  const int64_t group = t.index / p.tokens_per_group();
  t.cache_index = p.write_index_ptr[t.batch * p.write_index_stride[0] + group * p.write_index_stride[1]] +
                  t.index % p.tokens_per_group();
  return t;
}

void gather_rotation(const KvUpdateParams& p, const Token& t, float* out) {
  const float* time = p.rope_t_ptr + t.batch * p.rope_t_stride[0] + t.frame * p.rope_t_stride[1];
  out = std::copy_n(time, 2 * p.time_pairs, out);
  out = std::copy_n(p.rope_h_ptr + t.row * 2 * p.row_pairs, 2 * p.row_pairs, out);
  std::copy_n(p.rope_w_ptr + t.column * 2 * p.column_pairs, 2 * p.column_pairs, out);
}

template <typename T>
void run(const KvUpdateParams& p, int num_threads) {
  const std::vector<float> q_weight = widen<T>(p.q_norm_ptr, p.channels());
  const std::vector<float> k_weight = widen<T>(p.k_norm_ptr, p.channels());
  const int64_t total = p.batch * p.tokens();
#pragma omp parallel num_threads(static_cast<int>(std::clamp<int64_t>(num_threads, 1, total)))
  {
    std::vector<float> buffer(p.channels()), rotation(p.head_dim);
    const auto at = [](const void* base, int64_t offset) { return static_cast<const T*>(base) + offset; };
    const auto out = [](void* base, int64_t offset) { return static_cast<T*>(base) + offset; };
#pragma omp for schedule(static)
    for (int64_t flat = 0; flat < total; ++flat) {
      const Token t = locate(p, flat);
      gather_rotation(p, t, rotation.data());
      Row row{};
      row.rotation = rotation.data();
      row.buffer = buffer.data();
      row.heads = p.heads;
      row.head_dim = p.head_dim;
      row.eps = p.eps;

      row.source = at(p.q_ptr, t.batch * p.q_stride[0] + t.index * p.q_stride[1]);
      row.weight = q_weight.data();
      row.target = reinterpret_cast<char*>(out(p.q_out_ptr, (t.batch * p.heads * p.tokens() + t.index) * p.head_dim));
      row.head_stride = p.tokens() * p.head_dim;
      norm_rotate_row(row, T{});

      row.source = at(p.k_ptr, t.batch * p.k_stride[0] + t.index * p.k_stride[1]);
      row.weight = k_weight.data();
      row.target = reinterpret_cast<char*>(
          out(p.k_cache_ptr, t.batch * p.k_cache_stride[0] + t.cache_index * p.k_cache_stride[2]));
      row.head_stride = p.k_cache_stride[1];
      norm_rotate_row(row, T{});

      const T* v = at(p.v_ptr, t.batch * p.v_stride[0] + t.index * p.v_stride[1]);
      T* v_target = out(p.v_cache_ptr, t.batch * p.v_cache_stride[0] + t.cache_index * p.v_cache_stride[2]);
      for (int64_t h = 0; h < p.heads; ++h) {
        std::memcpy(v_target + h * p.v_cache_stride[1], v + h * p.head_dim, p.head_dim * sizeof(T));
      }
    }
  }
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

}  // namespace

Status kv_update_cpu(const KvUpdateParams& params, int num_threads) {
  Status status = check_write_index(params);
  if (status.empty()) {
    dispatch_dtype<float, bfloat16, float16>(params.dtype, [&](auto tag) { run<decltype(tag)>(params, num_threads); });
  }
  return status;
}

}  // namespace cfpp

// CPU kernel of gated_residual.
// One task: a token. The LayerNorm takes the float32 sum before it is rounded for storage, which is closer to the exact
//   result than the LayerNorm of the rounded sum.
#include <vector>

#include "common/cpu.h"
#include "common/layer_norm.h"
#include "gated_residual/gated_residual.h"

namespace cfpp {
namespace {

struct Row {
  const void *x, *y, *gate, *shift, *scale;  // [dim]; gate may be null
  void *sum, *normed;                        // [dim]
  float* buffer;                             // [dim] scratch
  int64_t dim;
  float scale_offset, eps;
};

template <typename T>
[[gnu::always_inline]] inline void add_norm(const Row& row) {
  const T* __restrict__ x = static_cast<const T*>(row.x);
  const T* __restrict__ y = static_cast<const T*>(row.y);
  const T* __restrict__ gate = static_cast<const T*>(row.gate);
  T* __restrict__ stored = static_cast<T*>(row.sum);
  float* __restrict__ buffer = row.buffer;
  float sum = 0.f;
  if (gate != nullptr) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < row.dim; ++i) {
      buffer[i] = to_float(x[i]) + to_float(gate[i]) * to_float(y[i]);
      stored[i] = from_float<T>(buffer[i]);
      sum += buffer[i];
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < row.dim; ++i) {
      buffer[i] = to_float(x[i]) + to_float(y[i]);
      stored[i] = from_float<T>(buffer[i]);
      sum += buffer[i];
    }
  }
  layer_norm(buffer, sum, row.dim, row.eps, row.scale_offset, static_cast<const T*>(row.scale),
             static_cast<const T*>(row.shift), static_cast<T*>(row.normed));
}

CFPP_CLONES void add_norm_row(const Row& row, float) { add_norm<float>(row); }
CFPP_CLONES void add_norm_row(const Row& row, bfloat16) { add_norm<bfloat16>(row); }
CFPP_CLONES void add_norm_row(const Row& row, float16) { add_norm<float16>(row); }

template <typename T>
void run(const GatedResidualParams& p, int num_threads) {
  const int64_t tokens_per_frame = p.tokens / p.frames;
  parallel_for(p.batch * p.tokens, p.dim, num_threads, [&](int64_t first, int64_t last) {
    std::vector<float> buffer(p.dim);
    for (int64_t flat = first; flat < last; ++flat) {
      const int64_t batch = flat / p.tokens, token = flat % p.tokens, frame = token / tokens_per_frame;
      const auto at = [&](const void* base, const int64_t (&stride)[2], int64_t index) {
        return static_cast<const T*>(base) + batch * stride[0] + index * stride[1];
      };
      Row row{};
      row.x = at(p.x_ptr, p.x_stride, token);
      row.y = at(p.y_ptr, p.y_stride, token);
      row.gate = p.gate_ptr == nullptr ? nullptr : at(p.gate_ptr, p.gate_stride, frame);
      row.shift = at(p.shift_ptr, p.shift_stride, frame);
      row.scale = at(p.scale_ptr, p.scale_stride, frame);
      row.sum = static_cast<T*>(p.sum_ptr) + flat * p.dim;
      row.normed = static_cast<T*>(p.normed_ptr) + flat * p.dim;
      row.buffer = buffer.data();
      row.dim = p.dim;
      row.scale_offset = p.scale_offset;
      row.eps = p.eps;
      add_norm_row(row, T{});
    }
  });
}

}  // namespace

void gated_residual_cpu(const GatedResidualParams& params, int num_threads) {
  dispatch_dtype<float, bfloat16, float16>(params.dtype, [&](auto tag) { run<decltype(tag)>(params, num_threads); });
}

}  // namespace cfpp

// CPU kernel of adaln_modulate.
// One task: a token, whose row is read once and written once.
#include <vector>

#include "adaln_modulate/adaln_modulate.h"
#include "common/cpu.h"
#include "common/layer_norm.h"

namespace cfpp {
namespace {

struct Row {
  const void *x, *shift, *scale;  // [dim]
  void* out;                      // [dim]
  float* buffer;                  // [dim] scratch
  int64_t dim;
  float eps;
};

template <typename T>
[[gnu::always_inline]] inline void norm_modulate(const Row& row) {
  const T* __restrict__ x = static_cast<const T*>(row.x);
  float* __restrict__ buffer = row.buffer;
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < row.dim; ++i) {
    buffer[i] = to_float(x[i]);
    sum += buffer[i];
  }
  layer_norm(buffer, sum, row.dim, row.eps, 1.f, static_cast<const T*>(row.scale), static_cast<const T*>(row.shift),
             static_cast<T*>(row.out));
}

CFPP_CLONES void norm_modulate_row(const Row& row, float) { norm_modulate<float>(row); }
CFPP_CLONES void norm_modulate_row(const Row& row, bfloat16) { norm_modulate<bfloat16>(row); }
CFPP_CLONES void norm_modulate_row(const Row& row, float16) { norm_modulate<float16>(row); }

template <typename T>
void run(const AdalnModulateParams& p, int num_threads) {
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
      row.shift = at(p.shift_ptr, p.shift_stride, frame);
      row.scale = at(p.scale_ptr, p.scale_stride, frame);
      row.out = static_cast<T*>(p.out_ptr) + flat * p.dim;
      row.buffer = buffer.data();
      row.dim = p.dim;
      row.eps = p.eps;
      norm_modulate_row(row, T{});
    }
  });
}

}  // namespace

void adaln_modulate_cpu(const AdalnModulateParams& params, int num_threads) {
  dispatch_dtype<float, bfloat16, float16>(params.dtype, [&](auto tag) { run<decltype(tag)>(params, num_threads); });
}

}  // namespace cfpp

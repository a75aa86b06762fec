// CPU kernel of denoise_update.
// One task: kSpan values of a frame.
#include <algorithm>

#include "common/cpu.h"
#include "common/half.h"
#include "denoise_update/denoise_update.h"

namespace cfpp {
namespace {

constexpr int64_t kSpan = 8192;  // values of a frame that one task updates

struct Span {
  const float *x, *noise;  // [size]; noise may be null
  const void* velocity;    // [size]
  float *x0, *x_next;      // [size]
  float sigma, next_sigma;
  int64_t size;
};

template <typename T>
[[gnu::always_inline]] inline void update(const Span& span) {
  const float* __restrict__ x = span.x;
  const T* __restrict__ velocity = static_cast<const T*>(span.velocity);
  float* __restrict__ x0 = span.x0;
  const float sigma = span.sigma, next_sigma = span.next_sigma;
  if (span.noise == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < span.size; ++i) x0[i] = x[i] - sigma * to_float(velocity[i]);
    return;
  }
  const float* __restrict__ noise = span.noise;
  float* __restrict__ x_next = span.x_next;
#pragma omp simd
  for (int64_t i = 0; i < span.size; ++i) {
    const float clean = x[i] - sigma * to_float(velocity[i]);
    x0[i] = clean;
    x_next[i] = (1.f - next_sigma) * clean + next_sigma * noise[i];
  }
}

CFPP_CLONES void update_span(const Span& span, float) { update<float>(span); }
CFPP_CLONES void update_span(const Span& span, bfloat16) { update<bfloat16>(span); }
CFPP_CLONES void update_span(const Span& span, float16) { update<float16>(span); }

template <typename T>
void run(const DenoiseUpdateParams& p, int num_threads) {
  const int64_t spans = (p.frame_size + kSpan - 1) / kSpan;
  parallel_for(p.batch * p.frames * spans, kSpan, num_threads, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t flat = task / spans, batch = flat / p.frames, frame = flat % p.frames;
      const int64_t begin = task % spans * kSpan, offset = flat * p.frame_size + begin;
      const auto level = [&](const float* levels, const int64_t (&stride)[2]) {
        return levels[batch * stride[0] + frame * stride[1]];
      };
      Span span{};
      span.x = p.x_ptr + offset;
      span.velocity = static_cast<const T*>(p.velocity_ptr) + offset;
      span.x0 = p.x0_ptr + offset;
      span.sigma = level(p.sigma_ptr, p.sigma_stride);
      span.size = std::min(kSpan, p.frame_size - begin);
      if (p.noise_ptr != nullptr) {
        span.noise = p.noise_ptr + offset;
        span.x_next = p.x_next_ptr + offset;
        span.next_sigma = level(p.next_sigma_ptr, p.next_sigma_stride);
      }
      update_span(span, T{});
    }
  });
}

}  // namespace

void denoise_update_cpu(const DenoiseUpdateParams& params, int num_threads) {
  dispatch_dtype<float, bfloat16, float16>(params.velocity_dtype,
                                           [&](auto tag) { run<decltype(tag)>(params, num_threads); });
}

}  // namespace cfpp

// block_attention for AVX2 and FMA. 16-bit types are widened to float.
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "block_attention/cpu/kernel.h"
#include "common/half.h"

#ifdef CFPP_ATTENTION_X86
#include <immintrin.h>

// From here on functions are compiled for the target. The standard headers above are not: an inline function of theirs
// would carry instructions that other CPUs lack into the rest of the module.
#pragma GCC push_options
#pragma GCC target("avx2,fma")

#include "block_attention/cpu/tile.h"

namespace cfpp {
namespace {

// 3 x 4 accumulators, 3 vectors of lanes and a broadcast word: all 16 registers.
struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8, kRows = 4;

  CFPP_INLINE Vec load(const void* address) { return _mm256_loadu_ps(static_cast<const float*>(address)); }
  CFPP_INLINE void store(void* address, Vec x) { _mm256_storeu_ps(static_cast<float*>(address), x); }
  CFPP_INLINE Vec set(float x) { return _mm256_set1_ps(x); }
  CFPP_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  CFPP_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  CFPP_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  CFPP_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  CFPP_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

  // For x <= 0. The exponent is put together from n + 127, so 2^-127 and less come out as 0; max keeps a NaN of x.
  CFPP_INLINE Vec exp2(Vec x) {
    x = _mm256_max_ps(_mm256_set1_ps(-127.f), x);
    const Vec n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_add_ps(n, _mm256_set1_ps(127.f))), 23);
    return _mm256_mul_ps(exp2_fraction<Avx2>(_mm256_sub_ps(x, n)), _mm256_castsi256_ps(exponent));
  }
};

}  // namespace

BlockAttentionKernel block_attention_avx2(DType dtype) { return attention_kernel<Avx2>(dtype); }

}  // namespace cfpp

#pragma GCC pop_options
#endif

// block_attention for AVX-512, in float and, where the CPU has AVX512_BF16, in pairs of bfloat16.
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "block_attention/cpu/kernel.h"
#include "common/half.h"

#ifdef CFPP_ATTENTION_X86
// GCC 12 warns about the deliberately undefined pass-through operand of its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

// From here on functions are compiled for the target. The standard headers above are not: an inline function of theirs
// would carry instructions that other CPUs lack into the rest of the module.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")

#include "block_attention/cpu/tile.h"

namespace cfpp {
namespace {

// 3 x 8 accumulators, 3 vectors of lanes and a broadcast word: 28 of 32 registers, and 11 loads per 24 FMAs.
struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16, kRows = 8;

  CFPP_INLINE Vec load(const void* address) { return _mm512_loadu_ps(address); }
  CFPP_INLINE void store(void* address, Vec x) { _mm512_storeu_ps(address, x); }
  CFPP_INLINE Vec set(float x) { return _mm512_set1_ps(x); }
  CFPP_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  CFPP_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  CFPP_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  CFPP_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  CFPP_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

  // Reduction and scaling saturate by themselves: -infinity gives 0, NaN stays.
  CFPP_INLINE Vec exp2(Vec x) {
    const Vec fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(exp2_fraction<Avx512>(fraction), _mm512_sub_ps(x, fraction));
  }

  CFPP_INLINE Vec dot_pairs(Vec acc, Vec a, Vec b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }

  // Rounds to bfloat16: `low` to the low halves of the words, `high` to the high ones.
  CFPP_INLINE Vec pair(Vec low, Vec high) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    const __m512i order =
        _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008, 0x170007,
                         0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves));
  }
};

}  // namespace

BlockAttentionKernel block_attention_avx512(DType dtype) { return attention_kernel<Avx512>(dtype); }

BlockAttentionKernel block_attention_avx512_bf16(DType dtype) {
  return dtype == DType::kBFloat16 ? attention_kernel<Avx512, bfloat16, 2>() : attention_kernel<Avx512>(dtype);
}

}  // namespace cfpp

#pragma GCC pop_options
#endif

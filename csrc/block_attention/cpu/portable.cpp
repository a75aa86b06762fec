// block_attention for all other CPUs: 128-bit vectors of the compiler, SSE2 on x86-64 and NEON on Arm.
#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

#include "block_attention/cpu/tile.h"

namespace cfpp {
namespace {

struct Portable {
  typedef float Vec __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
#ifdef __aarch64__
  static constexpr int kRows = 8;  // 32 registers
#else
  static constexpr int kRows = 4;  // 16 registers
#endif

  CFPP_INLINE Vec load(const void* address) {
    Vec x;
    std::memcpy(&x, address, sizeof x);
    return x;
  }
  CFPP_INLINE void store(void* address, Vec x) { std::memcpy(address, &x, sizeof x); }
  CFPP_INLINE Vec set(float x) { return Vec{x, x, x, x}; }
  CFPP_INLINE Vec add(Vec a, Vec b) { return a + b; }
  CFPP_INLINE Vec sub(Vec a, Vec b) { return a - b; }
  CFPP_INLINE Vec mul(Vec a, Vec b) { return a * b; }
  CFPP_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
  CFPP_INLINE Vec fma(Vec a, Vec b, Vec c) {
#ifdef __aarch64__
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
  }

  // For x <= 0. Adding 1.5 * 2^23 + 127 rounds x to an integer n and leaves n + 127 in the low bits, the exponent;
  // 2^-127 and less come out as 0.
  CFPP_INLINE Vec exp2(Vec x) {
    x = x < -127.f ? set(-127.f) : x;
    const Vec magic = set(12583039.f);
    const Vec shifted = x + magic;
    const Vec fraction = x - (shifted - magic);
    const Vec power = (Vec)((Ints)shifted << 23);
    return exp2_fraction<Portable>(fraction) * power;
  }
};

}  // namespace

BlockAttentionKernel block_attention_portable(DType dtype) { return attention_kernel<Portable>(dtype); }

}  // namespace cfpp

// Vectors of 16 lanes for CPU kernels, in whatever registers the instruction set has, and stores past the caches. All
// functions that pass them are inlined, so the ABI of such calls does not matter: the build switches off -Wpsabi.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace cfpp {

constexpr int kLanes = 16;
constexpr int64_t kStreamBytes = 8 << 20;  // a call that writes more than this would not stay in the cache anyway

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Shorts __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

template <typename Vector>
[[gnu::always_inline]] inline Vector read(const void* source) {
  Vector vector;
  std::memcpy(&vector, source, sizeof(Vector));
  return vector;
}

// kStream: past the caches; the target is 16-byte aligned.
template <bool kStream, typename Vector>
[[gnu::always_inline]] inline void write(void* target, Vector vector) {
#if defined(__SSE2__)
  if (kStream) {
    __m128i parts[sizeof(Vector) / sizeof(__m128i)];
    std::memcpy(parts, &vector, sizeof(Vector));
    for (size_t i = 0; i < sizeof(Vector) / sizeof(__m128i); ++i) {
      _mm_stream_si128(static_cast<__m128i*>(target) + i, parts[i]);
    }
    return;
  }
#endif
  std::memcpy(target, &vector, sizeof(Vector));
}

// Makes streaming stores visible to other threads before this thread reports that it has finished.
template <bool kStream>
[[gnu::always_inline]] inline void finish_writes() {
#if defined(__SSE2__)
  if (kStream) _mm_sfence();
#endif
}

}  // namespace cfpp

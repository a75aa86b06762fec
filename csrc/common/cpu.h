// Shared by CPU kernels: builds of a function for several instruction sets, and the loop over threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

// Prefix of a kernel's innermost function: compiled per instruction set and chosen at load time where the compiler
// supports that; elsewhere compiled once.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CFPP_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CFPP_CLONES
#endif

namespace cfpp {

constexpr int64_t kElementsPerThread = 16384;  // fewer do not pay for waking another thread

// Splits tasks 0 .. count, of `elements` elements each, among threads: f(first, last) once per thread.
template <typename F>
void parallel_for(int64_t count, int64_t elements, int num_threads, F&& f) {
  const int64_t threads = std::min<int64_t>({num_threads, count, count * elements / kElementsPerThread});
  if (threads <= 1) {
    f(int64_t{0}, count);
    return;
  }
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const int64_t team = omp_get_num_threads(), member = omp_get_thread_num();
    f(count * member / team, count * (member + 1) / team);
  }
}

}  // namespace cfpp

// The Hopper (sm_90a) instructions that kernels use, one small function each: mbarriers, TMA, wgmma, named barriers and
// the register hand-over between warpgroups. Under CFPP_EMULATE the same names come from the CPU emulator of the tests.
#pragma once

#include <cstdint>
#include <cstdio>
#include <type_traits>

#include "common/ptx.cuh"

namespace cfpp {

// How long L2 keeps the data that TMA reads, in createpolicy's encoding.
constexpr uint64_t kEvictFirst = 0x12f0000000000000, kEvictLast = 0x14f0000000000000;

}  // namespace cfpp

#ifdef CFPP_EMULATE
#include "hopper.h"
#else
#include <cuda.h>  // types only: functions of the driver are found at run time

namespace cfpp {

using TensorMap = CUtensorMap;

// One thread of a converged warp.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "elect.sync _|p, 0xffffffff;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(elected));
  return elected != 0;
}

// An mbarrier in shared memory: a phase ends when all its arrivals and all announced bytes have come.
struct Barrier {
  uint64_t state;
};

__device__ __forceinline__ void barrier_init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// Shows initialised barriers to TMA. A __syncthreads() shows them to the other threads.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives and announces that this phase also waits for `bytes` from TMA.
__device__ __forceinline__ void barrier_arrive_expecting(Barrier& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ bool barrier_try_wait(Barrier& barrier, int parity) {
  uint32_t passed;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(passed)
      : "r"(shared_address(&barrier)), "r"(parity)
      : "memory");
  return passed != 0;
}

// Until the phase of this parity has ended; parity 1 passes at once on a fresh barrier. For debugging, with
// CFPP_BOUNDED_WAIT, a wait that never ends says so and stops the kernel. The call of printf serialises wgmma.
__device__ __forceinline__ void barrier_wait(Barrier& barrier, int parity) {
#ifdef CFPP_BOUNDED_WAIT
  for (int polls = 0; !barrier_try_wait(barrier, parity); ++polls) {
    if (polls == 1 << 26) {
      printf("cta %d thread %d: barrier at %u never ended parity %d\n", blockIdx.x, threadIdx.x,
             shared_address(&barrier), parity);
      __trap();
    }
  }
#else
  while (!barrier_try_wait(barrier, parity)) {
  }
#endif
}

// Loads the box that starts at these coordinates, innermost first, and reports the bytes that have arrived to
// `barrier`.
__device__ __forceinline__ void tma_load(void* tile, const TensorMap& map, Barrier& barrier, int c0, int c1, int c2,
                                         int c3, int c4, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(tile)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void tma_prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Between ordinary writes to shared memory and wgmma or TMA touching the same bytes: by the writers, before the
// barrier.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Named barriers, 1 to 15. The ids are constants: with others ptxas would reserve all sixteen.
template <int kId, int kThreads>
__device__ __forceinline__ void named_barrier_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

// The kernel's registers per thread, moved between warpgroups; each executed by a full warpgroup.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// wgmma runs on its own: wgmma_fence() before the first of a batch and after touching registers that it uses,
// wgmma_commit() behind the last, wgmma_wait<n>() until at most n batches are under way. The accumulators and register
// operands must not be touched meanwhile.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of these registers across here: it sees no dependence between them and the
// fences and waits of wgmma.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&registers)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) asm volatile("" : "+r"(registers[i / 4][i % 4])::"memory");
}

// The operand lists of wgmma below, which PTX requires in full: 8 registers, and the names of 32, 64 and 88.
#define CFPP_F8(d, i)                                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define CFPP_F32(d, i) CFPP_F8(d, i), CFPP_F8(d, i + 8), CFPP_F8(d, i + 16), CFPP_F8(d, i + 24)
#define CFPP_NAMES_32                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CFPP_NAMES_64                                              \
  CFPP_NAMES_32                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CFPP_NAMES_88                                              \
  CFPP_NAMES_64                                                    \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, " \
  "%76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87"

// d (64 x 176) = A B^T, plus d if `accumulate`; A (64 x 16) and B (176 x 16) in shared memory, both contiguous along
// the summed index. The accumulator of thread t: d[i] is row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), column 8 (i / 4)
// + 2 (t % 4) + i % 2.
#define CFPP_WGMMA_SS(TYPE)                                                             \
  asm volatile(                                                                         \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %90, 0;\n\t"                                \
      "wgmma.mma_async.sync.aligned.m64n176k16.f32." TYPE "." TYPE " {" CFPP_NAMES_88   \
      "}, %88, %89, p, "                                                                \
      "1, 1, 0, 0;\n\t}"                                                                \
      : CFPP_F32(d, 0), CFPP_F32(d, 32), CFPP_F8(d, 64), CFPP_F8(d, 72), CFPP_F8(d, 80) \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

template <typename T>
__device__ __forceinline__ void wgmma(float (&d)[88], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    CFPP_WGMMA_SS("bf16");
  } else {
    CFPP_WGMMA_SS("f16");
  }
}

// d (64 x 128 or 64 x 64) = A B, plus d if `accumulate`; A (64 x 16) in registers, B (16 x 128 or 64) in shared memory,
// contiguous along its columns. A's element (row, column) is where the accumulator of a 64 x 16 product would have it,
// rounded and packed in pairs.
#define CFPP_WGMMA_RS(TYPE, SHAPE, NAMES, A, B, P, ...)                                                \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " P                                               \
               ", 0;\n\t"                                                                              \
               "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" NAMES "}, {" A "}, " B \
               ", p, 1, 1, 1;\n\t}"                                                                    \
               : __VA_ARGS__                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))
#define CFPP_WGMMA_RS_128(TYPE) \
  CFPP_WGMMA_RS(TYPE, "m64n128k16", CFPP_NAMES_64, "%64, %65, %66, %67", "%68", "%69", CFPP_F32(d, 0), CFPP_F32(d, 32))
#define CFPP_WGMMA_RS_64(TYPE) \
  CFPP_WGMMA_RS(TYPE, "m64n64k16", CFPP_NAMES_32, "%32, %33, %34, %35", "%36", "%37", CFPP_F32(d, 0))

template <typename T>
__device__ __forceinline__ void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    CFPP_WGMMA_RS_128("bf16");
  } else {
    CFPP_WGMMA_RS_128("f16");
  }
}

template <typename T>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    CFPP_WGMMA_RS_64("bf16");
  } else {
    CFPP_WGMMA_RS_64("f16");
  }
}

#undef CFPP_F8
#undef CFPP_F32
#undef CFPP_NAMES_32
#undef CFPP_NAMES_64
#undef CFPP_NAMES_88
#undef CFPP_WGMMA_SS
#undef CFPP_WGMMA_RS
#undef CFPP_WGMMA_RS_128
#undef CFPP_WGMMA_RS_64

}  // namespace cfpp
#endif

// csrc/common/ptx.cuh on the host: same names, the documented semantics.
#pragma once

#include <cstring>
#include <deque>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace cfpp {

inline uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }

// ---- cp.async: a copy lands when its thread waits for it, not earlier; until then its destination is poisoned ----

struct AsyncCopy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
};
struct AsyncCopies {
  std::vector<std::vector<AsyncCopy>> open{1024};                // per thread
  std::vector<std::deque<std::vector<AsyncCopy>>> groups{1024};  // per thread, oldest first
};

inline void cp_async_16(uint32_t to, const void* from, int bytes) {
  if (bytes < 0 || bytes > 16) emulator::fail("cp.async of " + std::to_string(bytes) + " bytes");
  if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("cp.async from a misaligned address");
  emulator::check_readable(from, bytes > 0 ? bytes : 1);  // nothing is read of 0 bytes, but the address must be valid
  unsigned char* const target = emulator::shared_pointer(to, 16, 16);
  std::memset(target, emulator::kPoison, 16);
  const auto* source = static_cast<const unsigned char*>(from);
  emulator::state<AsyncCopies>().open[emulator::thread().rank].push_back({target, source, bytes});
}

inline void cp_async_commit() {
  AsyncCopies& copies = emulator::state<AsyncCopies>();
  const int thread = emulator::thread().rank;
  copies.groups[thread].push_back(std::move(copies.open[thread]));
  copies.open[thread].clear();
}

template <int kPending>
void cp_async_wait() {
  auto& groups = emulator::state<AsyncCopies>().groups[emulator::thread().rank];
  for (; groups.size() > kPending; groups.pop_front()) {
    for (const AsyncCopy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

// ---- ldmatrix ----

template <bool kTranspose>
void ldmatrix(const char* name, uint32_t (&to)[4], uint32_t from) {
  struct Lane {
    const unsigned char* row;
    uint32_t* to;
  } mine{emulator::shared_pointer(from, 16, 16), to};
  emulator::meet(emulator::my_warp(), name, &mine, [](Lane** all) {
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int row = kTranspose ? 2 * t + i : g, column = kTranspose ? g : 2 * t + i;
          std::memcpy(&pair[i], all[8 * matrix + row]->row + 2 * column, 2);
        }
        all[lane]->to[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
    }
  });
}

inline void ldmatrix_x4(uint32_t (&to)[4], uint32_t from) { ldmatrix<false>("ldmatrix", to, from); }
inline void ldmatrix_x4_trans(uint32_t (&to)[4], uint32_t from) { ldmatrix<true>("ldmatrix.trans", to, from); }

// ---- arithmetic ----

template <typename T>
float half_of(uint32_t pair, int which) {
  return cfpp_host::to_float(T{static_cast<uint16_t>(pair >> (16 * which))});
}

template <typename T>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } mine{c, a, {b0, b1}};
  emulator::meet(emulator::my_warp(), "mma", &mine, [](Lane** all) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 2; ++i) {
        for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][2 * t + r / 2 * 8 + i] = half_of<T>(all[lane]->a[r], i);
        for (int r = 0; r < 2; ++r) b[2 * t + r * 8 + i][g] = half_of<T>(all[lane]->b[r], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        float sum = all[lane]->c[i];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        all[lane]->c[i] = sum;
      }
    }
  });
}

inline void derive_again(int&) {}
inline float exp2_approx(float x) { return exp2f(x) < 1.17549435e-38f ? 0.f : exp2f(x); }

template <typename T>
uint32_t pack_2(float low, float high) {
  return cfpp_host::from_float<T>(low).bits | static_cast<uint32_t>(cfpp_host::from_float<T>(high).bits) << 16;
}

}  // namespace cfpp

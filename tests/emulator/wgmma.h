// wgmma on the host, and the rules of all asynchronous units: they do their work at a random moment, and they do not
// see ordinary writes to shared memory that were not fenced.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "core.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace emulator {

constexpr int kWarpgroup = 128, kMmaRows = 64, kMmaDepth = 16;

// Shared memory as TMA and wgmma know it.
struct AsyncView {
  std::vector<unsigned char> bytes{cta().shared, cta().shared + cta().shared_bytes};
};
inline unsigned char* async_view() { return state<AsyncView>().bytes.data(); }

// Where the 128-byte swizzle puts a byte: the hardware does this to addresses, not to offsets in a tile.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline float async_value(uint32_t address, bool half) {
  if (address + 2 > cta().shared_bytes) fail("wgmma reads at " + std::to_string(address) + ", past shared memory");
  uint16_t bits;
  std::memcpy(&bits, async_view() + address, 2);
  return half ? cfpp_host::to_float(cfpp_host::float16{bits}) : cfpp_host::to_float(cfpp_host::bfloat16{bits});
}

// An event of an asynchronous unit: at once, a little later or, as often, so late that all threads wait for it.
inline void put_off(const std::function<void()>& work, int turns) {
  post([=] {
    if (turns > 0) return put_off(work, turns - 1);
    work();
  });
}
inline void post_unit(const std::function<void()>& work) {
  constexpr int kTurns[] = {0, 10, 1000};
  put_off(work, seed == 0 ? 0 : kTurns[random_bits() % 3]);
}

// ---- wgmma ----

// One wgmma instruction of a warpgroup.
struct Mma {
  uint64_t a, b;
  int columns;
  bool accumulate, registers, half;
  const uint32_t* fragments[kWarpgroup];  // with `registers`: 4 per thread, read when it runs
};

// What wgmma.commit_group closed: products into the same accumulator.
struct Batch {
  std::vector<Mma> products;
  float* accumulator[kWarpgroup];
  std::vector<float> values[kWarpgroup];  // of the accumulator while it is under way
  int committed = 0;                      // threads
  bool done = false;
};

struct WarpgroupUnit {
  std::vector<std::unique_ptr<Batch>> batches;
  int next = 0;  // to run
  // Per thread: the batch being filled, products in it, batches waited for, and whether wgmma.fence came since.
  int filling[kWarpgroup] = {}, filled[kWarpgroup] = {}, taken[kWarpgroup] = {};
  bool fenced[kWarpgroup] = {};
  std::vector<Thread*> sleepers;
};

struct Operand {
  uint32_t start, leading, stride;
};

inline Operand decode(uint64_t descriptor) {
  const auto bytes = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  if (descriptor >> 62 != 1) fail("wgmma: the descriptor does not say 128-byte swizzle");
  if ((descriptor >> 49 & 7) != 0) fail("wgmma: the descriptor has a base offset");
  return {bytes(0), bytes(16), bytes(32)};
}

// Row `i` of 8 x 64 atoms whose 64 columns are the summed index.
inline uint32_t k_major(const Operand& x, int i, int k) {
  return swizzled(x.start + i / 8 * x.stride + i % 8 * 128 + 2 * k);
}

// Column `i` of 8 x 64 atoms whose 8 rows are the summed index.
inline uint32_t mn_major(const Operand& x, int i, int k) {
  return swizzled(x.start + i / 64 * x.leading + k / 8 * x.stride + k % 8 * 128 + i % 64 * 2);
}

inline int accumulator_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
inline int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

inline void multiply(const Mma& product, std::vector<float>& sums) {
  const int columns = product.columns;
  const Operand b = decode(product.b), a = product.registers ? Operand{} : decode(product.a);
  static std::vector<float> left(kMmaRows * kMmaDepth), right;
  right.resize(columns * kMmaDepth);
  for (int k = 0; k < kMmaDepth; ++k) {
    for (int n = 0; n < columns; ++n) {
      right[k * columns + n] = async_value(product.registers ? mn_major(b, n, k) : k_major(b, n, k), product.half);
    }
    for (int m = 0; m < kMmaRows && !product.registers; ++m) {
      left[m * kMmaDepth + k] = async_value(k_major(a, m, k), product.half);
    }
  }
  for (int thread = 0; thread < kWarpgroup && product.registers; ++thread) {
    for (int e = 0; e < 8; ++e) {
      const auto bits = static_cast<uint16_t>(product.fragments[thread][e / 2] >> (16 * (e % 2)));
      const float value =
          product.half ? cfpp_host::to_float(cfpp_host::float16{bits}) : cfpp_host::to_float(cfpp_host::bfloat16{bits});
      left[accumulator_row(thread, e) * kMmaDepth + accumulator_column(thread, e)] = value;
    }
  }
  for (int m = 0; m < kMmaRows; ++m) {
    float* row = sums.data() + m * columns;
    if (!product.accumulate) std::fill(row, row + columns, 0.f);
    for (int k = 0; k < kMmaDepth; ++k) {
      const float x = left[m * kMmaDepth + k];
      const float* other = right.data() + k * columns;
      for (int n = 0; n < columns; ++n) row[n] += x * other[n];
    }
  }
}

// Runs the oldest batch that has not run: batches of a warpgroup come one after the other.
inline void run_batch(WarpgroupUnit& unit) {
  Batch& batch = *unit.batches[unit.next++];
  const int columns = batch.products.front().columns;
  std::vector<float> sums(kMmaRows * columns);
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    for (int i = 0; i < columns / 2; ++i) {
      sums[accumulator_row(thread, i) * columns + accumulator_column(thread, i)] = batch.values[thread][i];
    }
  }
  for (const Mma& product : batch.products) multiply(product, sums);
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    for (int i = 0; i < columns / 2; ++i) {
      batch.values[thread][i] = sums[accumulator_row(thread, i) * columns + accumulator_column(thread, i)];
    }
  }
  batch.done = true;
  cta().wake(unit.sleepers);
}

inline WarpgroupUnit& my_unit() { return state<std::map<int, WarpgroupUnit>>()[thread().rank / kWarpgroup]; }
inline int my_place() { return thread().rank % kWarpgroup; }

inline void issue(const Mma& mine, const uint32_t* fragment, float* accumulator) {
  WarpgroupUnit& unit = my_unit();
  const int me = my_place(), number = unit.filling[me], index = unit.filled[me]++;
  if (!unit.fenced[me]) fail("wgmma without wgmma.fence since the last wait");
  while (static_cast<int>(unit.batches.size()) <= number) unit.batches.push_back(std::make_unique<Batch>());
  Batch& batch = *unit.batches[number];
  if (index == static_cast<int>(batch.products.size())) batch.products.push_back(mine);
  Mma& product = batch.products[index];
  if (product.a != mine.a || product.b != mine.b || product.columns != mine.columns ||
      product.accumulate != mine.accumulate || product.registers != mine.registers) {
    fail("the threads of a warpgroup disagree about a wgmma");
  }
  product.fragments[me] = fragment;
  if (index == 0) {
    for (int other = unit.taken[me]; other < number; ++other) {
      if (unit.batches[other]->accumulator[me] == accumulator)
        fail("wgmma: a batch before is not done with the registers");
    }
    batch.accumulator[me] = accumulator;
    batch.values[me].assign(accumulator, accumulator + mine.columns / 2);
    std::fill(accumulator, accumulator + mine.columns / 2, NAN);
  } else if (batch.accumulator[me] != accumulator) {
    fail("wgmma: two accumulators in a batch are not emulated");
  }
}

inline void commit() {
  WarpgroupUnit& unit = my_unit();
  const int me = my_place(), number = unit.filling[me]++;
  Batch& batch = *unit.batches.at(number);
  if (unit.filled[me] != static_cast<int>(batch.products.size()) && batch.committed > 0) {
    fail("the threads of a warpgroup disagree about the length of a wgmma batch");
  }
  unit.filled[me] = 0;
  if (++batch.committed == kWarpgroup) post_unit([&unit] { run_batch(unit); });
}

// Until at most `pending` batches are under way, whose results are still the unit's.
inline void wait_for_batches(int pending) {
  WarpgroupUnit& unit = my_unit();
  const int me = my_place();
  for (; unit.taken[me] < unit.filling[me] - pending; ++unit.taken[me]) {
    Batch& batch = *unit.batches[unit.taken[me]];
    while (!batch.done) sleep_in(unit.sleepers, "wgmma.wait_group");
    float* const registers = batch.accumulator[me];
    for (size_t i = 0; i < batch.values[me].size(); ++i) {
      if (!std::isnan(registers[i])) fail("accumulator registers were written while wgmma was under way");
      registers[i] = batch.values[me][i];
    }
    batch.values[me] = {};
  }
  unit.fenced[me] = false;
}

}  // namespace emulator

namespace cfpp {

inline void wgmma_fence() { emulator::my_unit().fenced[emulator::my_place()] = true; }
inline void wgmma_commit() { emulator::commit(); }
template <int kPending>
void wgmma_wait() {
  emulator::wait_for_batches(kPending);
}
template <int kCount>
void pin(float (&)[kCount]) {}
template <int kCount>
void pin(uint32_t (&)[kCount][4]) {}

template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, __half>;

template <typename T, int kRegisters>
void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
  emulator::issue({a, b, 2 * kRegisters, accumulate, false, kIsHalf<T>, {}}, nullptr, d);
}
template <typename T, int kRegisters>
void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emulator::issue({0, b, 2 * kRegisters, accumulate, true, kIsHalf<T>, {}}, a, d);
}

}  // namespace cfpp

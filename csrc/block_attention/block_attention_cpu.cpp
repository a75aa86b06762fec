// Entry point of block_attention on the CPU: checks the ranges, chooses the kernel of this CPU, distributes query tiles
// over threads. The arithmetic is in cpu/tile.h.
#include <algorithm>
#include <memory>
#include <new>

#include "block_attention/cpu/kernel.h"
#include "common/token_ranges.h"

namespace cfpp {
namespace {

constexpr double kFlopsPerThread = 2e6;  // 10 to 20 us; with less, waking another thread is a gamble
constexpr int64_t kTilesPerThread = 8;   // enough that the last ones to finish do not matter

// Called for every pass, so text is made only of what is refused.
Status check_ranges(const BlockAttentionParams& p) {
  Status status = find_bad_range("block_attention", p.ranges_ptr, p.batch, p.groups, p.ranges, p.capacity);
  for (int64_t i = 0; status.empty() && i < p.batch * p.groups; ++i) {
    const int32_t* ranges = p.ranges_ptr + i * p.ranges * 2;
    const auto name = [&](const std::string& range) {
      return "block_attention: ranges[" + std::to_string(i / p.groups) + ", " + std::to_string(i % p.groups) + ", " +
             range + "] must be ";
    };
    const auto text = [&](int64_t r) {
      return "[" + std::to_string(ranges[2 * r]) + ", " + std::to_string(ranges[2 * r + 1]) + ")";
    };
    bool sees = false;
    for (int64_t r = 0; r < p.ranges; ++r) {
      const int32_t first = ranges[2 * r], last = ranges[2 * r + 1];
      for (int64_t other = 0; other < r; ++other) {
        if (first < ranges[2 * other + 1] && ranges[2 * other] < last) {
          return name(std::to_string(r)) + "apart from ranges[..., " + std::to_string(other) + "] " + text(other) +
                 ", got " + text(r);
        }
      }
      sees = sees || first != last;
    }
    if (!sees) return name(":") + "one token or more, got only (0, 0)";
  }
  return status;
}

BlockAttentionKernel pick_kernel(DType dtype) {
#ifdef CFPP_ATTENTION_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? block_attention_avx512_bf16(dtype) : block_attention_avx512(dtype);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return block_attention_avx2(dtype);
#endif
  return block_attention_portable(dtype);
}

double flops(const BlockAttentionParams& p) {
  int64_t visible = 0;
  for (int64_t i = 0; i < p.batch * p.groups * p.ranges; ++i) visible += p.ranges_ptr[2 * i + 1] - p.ranges_ptr[2 * i];
  return 4.0 * static_cast<double>(visible * p.queries_per_group() * p.heads * p.head_dim);
}

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

// This thread's memory for the packed keys and the results of a tile: kept, since a small call takes less time than
// getting it from the system.
void* scratch_of(size_t bytes) {
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t held = 0;
  if (held < bytes) {
    memory.reset();
    held = 0;
    memory.reset(::operator new(bytes, std::align_val_t{64}));
    held = bytes;
  }
  return memory.get();
}

void run(const BlockAttentionParams& p, const BlockAttentionKernel& kernel, int num_threads) {
  const int64_t lists = p.batch * p.heads * p.groups, per_group = p.queries_per_group();
  // Several register tiles share the packing of a KV tile, as long as there are tiles enough for the threads.
  int64_t rows = 4 * kernel.queries;
  while (rows > kernel.queries && lists * ceil_div(per_group, rows) < kTilesPerThread * num_threads) {
    rows -= kernel.queries;
  }
  const int64_t tiles = ceil_div(per_group, rows);
  const int64_t threads = std::clamp<int64_t>(static_cast<int64_t>(flops(p) / kFlopsPerThread), 1,
                                              std::min<int64_t>(std::max(num_threads, 1), lists * tiles));
  const size_t bytes = kernel.scratch_bytes(p, std::min(rows, per_group));
  const auto run_tile = [&](int64_t i) {
    const int64_t list = i / tiles, row = i % tiles * rows;
    QueryTile tile{};
    tile.group = list % p.groups;
    tile.head = list / p.groups % p.heads;
    tile.batch = list / p.groups / p.heads;
    tile.first = tile.group * per_group + row;
    tile.count = std::min(rows, per_group - row);
    kernel.run(p, tile, scratch_of(bytes));
  };
  if (threads == 1) {  // without starting OpenMP
    for (int64_t i = 0; i < lists * tiles; ++i) run_tile(i);
    return;
  }
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(threads))
  for (int64_t i = 0; i < lists * tiles; ++i) run_tile(i);
}

}  // namespace

Status block_attention_cpu(const BlockAttentionParams& params, int num_threads) {
  Status status = check_ranges(params);
  if (status.empty()) run(params, pick_kernel(params.dtype), num_threads);
  return status;
}

}  // namespace cfpp

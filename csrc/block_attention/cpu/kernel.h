// The interface of a CPU kernel to the entry point. Each instruction set has a translation unit that defines one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "block_attention/block_attention.h"

namespace cfpp {

// `count` queries of one head, from row `first` of q on, all of one group: the unit of work of a thread.
struct QueryTile {
  int64_t batch, head, group, first, count;
};

struct BlockAttentionKernel {
  int64_t queries;  // that one pass over the keys serves from registers: tiles are multiples of it where they can be
  size_t (*scratch_bytes)(const BlockAttentionParams& params, int64_t queries);
  void (*run)(const BlockAttentionParams& params, const QueryTile& tile, void* scratch);  // scratch: 64-byte aligned
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Compilers other than GCC build the portable kernel only.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CFPP_ATTENTION_X86 1
BlockAttentionKernel block_attention_avx512_bf16(DType dtype);  // bfloat16 multiplied as such
BlockAttentionKernel block_attention_avx512(DType dtype);
BlockAttentionKernel block_attention_avx2(DType dtype);
#endif
BlockAttentionKernel block_attention_portable(DType dtype);

}  // namespace cfpp

// The kernels behind block_attention_cuda and the checks that they share. Host code; combine.cuh has the device side.
#pragma once

#include "block_attention/block_attention.h"
#include "block_attention/plan.h"

namespace cfpp {

// A remainder tile is split into at most this many pieces: more of them save little and cost workspace.
constexpr int kMaxSplits = 8;

// How a kernel fills a device: the two numbers that make_plan takes.
struct Occupancy {
  int tile_rows = 0;  // queries of a tile
  int ctas = 0;       // that run at once, all SMs together
};

// Each kernel has an occupancy and a launcher. The launcher runs on the current device, with a plan made for its
// tile_rows (and any number of ctas and splits), and calls combine() itself. It checks the alignment of the
// params. Failures name the argument, or the launch that CUDA refused.
Status sm80_occupancy(const BlockAttentionParams& params, int device, Occupancy* occupancy);
Status block_attention_sm80(const BlockAttentionParams& params, const AttentionPlan& plan, void* stream);

// Compute capability 9.0 only.
Status sm90_occupancy(const BlockAttentionParams& params, int device, Occupancy* occupancy);
Status block_attention_sm90(const BlockAttentionParams& params, const AttentionPlan& plan, void* stream);

// Merges the partial results of the split tiles into the output. Does nothing when plan.splits is 1.
Status combine(const BlockAttentionParams& params, const AttentionPlan& plan, void* stream);

// "block_attention: <argument> must be <wanted> on CUDA, got <got>"
inline Status unsupported(const std::string& argument, const std::string& wanted, const std::string& got) {
  return "block_attention: " + argument + " must be " + wanted + " on CUDA, got " + got;
}

// Both kernels move rows in pieces of 16 bytes. Names the first argument that does not let them.
inline Status check_alignment(const BlockAttentionParams& p, const AttentionPlan& plan) {
  struct Argument {
    const char* name;
    const void* pointer;
    const int64_t* stride;  // null: contiguous
    int64_t sizes[3];
  };
  const Argument arguments[] = {
      {"q", p.q_ptr, p.q_stride, {p.batch, p.heads, p.queries}},
      {"k_cache", p.k_ptr, p.k_stride, {p.batch, p.heads, p.capacity}},
      {"v_cache", p.v_ptr, p.v_stride, {p.batch, p.heads, p.capacity}},
      {"out", p.out_ptr, nullptr, {}},
      {"workspace", plan.splits > 1 ? p.workspace_ptr : nullptr, nullptr, {}},
  };
  for (const Argument& argument : arguments) {
    const uintptr_t past = reinterpret_cast<uintptr_t>(argument.pointer) % 16;
    bool aligned = past == 0;
    std::string got = "an address " + std::to_string(past) + " bytes past a multiple";
    for (int i = 0; argument.stride != nullptr && i < 3; ++i) {
      aligned = aligned && (argument.sizes[i] == 1 || argument.stride[i] % 8 == 0);
      got += (i == 0 ? ", strides (" : ", ") + std::to_string(argument.stride[i]) + (i == 2 ? ")" : "");
    }
    if (!aligned) return unsupported(argument.name, "aligned to 16 bytes in address and strides", got);
  }
  return {};
}

}  // namespace cfpp

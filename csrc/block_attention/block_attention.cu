// Entry point of block_attention on CUDA: checks what it supports, chooses the kernel of the device, plans the launch.
#include <algorithm>

#include "block_attention/kernels.h"
#include "common/occupancy.cuh"

namespace cfpp {
namespace {

// Waves of pieces. More waves balance better but move more partial results.
constexpr int kMaxWaves = 2;

struct KernelEntry {
  Status (*occupancy)(const BlockAttentionParams& params, int device, Occupancy* occupancy);
  Status (*run)(const BlockAttentionParams& params, const AttentionPlan& plan, void* stream);
};

Status check_sizes(const BlockAttentionParams& p) {
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) {
    return unsupported("q", "torch.bfloat16 or torch.float16", name_of(p.dtype));
  }
  if (p.head_dim != 64 && p.head_dim != 128) return unsupported("head_dim", "64 or 128", std::to_string(p.head_dim));
  // Kernels take the maximum of the logits before they scale it.
  if (!(p.scale > 0.f)) return unsupported("scale", "above 0", std::to_string(p.scale));
  constexpr int64_t kMost = int64_t{1} << 30;  // leaves room to round up, in int32
  if (p.capacity > kMost) return unsupported("capacity", "at most 2^30", std::to_string(p.capacity));
  const int64_t rows = p.batch * p.heads * p.queries;
  if (rows > kMost) return unsupported("B * H * Sq", "at most 2^30", std::to_string(rows));
  return {};
}

// True if this build has code for sm_90a, the only target with Hopper's instructions.
constexpr bool has_hopper_code() {
#ifdef __CUDA_ARCH_LIST__
  for (const int arch : {__CUDA_ARCH_LIST__}) {
    if (arch == 900) return true;
  }
  return false;
#else
  return true;
#endif
}

Status make_launch(const BlockAttentionParams& p, int device, KernelEntry* kernel, AttentionPlan* plan) {
  Status status = check_sizes(p);
  if (!status.empty()) return status;
  int major = 0;
  const cudaError_t error = device_attribute(cudaDevAttrComputeCapabilityMajor, device, &major);
  if (error != cudaSuccess) return Status("block_attention: ") + cudaGetErrorString(error);
  *kernel = {sm80_occupancy, block_attention_sm80};
  if (major == 9 && has_hopper_code()) *kernel = {sm90_occupancy, block_attention_sm90};
  Occupancy occupancy;
  status = kernel->occupancy(p, device, &occupancy);
  if (!status.empty()) return status;
  const auto plan_with = [&](int max_splits) {
    return make_plan(p.batch, p.heads, p.groups, p.queries_per_group(), occupancy.tile_rows, occupancy.ctas,
                     max_splits);
  };
  const int rest = plan_with(1).tiles() % occupancy.ctas;
  *plan = plan_with(rest == 0 ? 1 : std::min(kMaxSplits, kMaxWaves * occupancy.ctas / rest));
  return {};
}

}  // namespace

Status block_attention_workspace(const BlockAttentionParams& params, int device, int64_t* bytes) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return Status("block_attention: ") + cudaGetErrorString(guard.error());
  KernelEntry kernel{};
  AttentionPlan plan{};
  const Status status = make_launch(params, device, &kernel, &plan);
  *bytes = status.empty() ? plan.workspace_bytes(static_cast<int>(params.head_dim)) : 0;
  return status;
}

Status block_attention_cuda(const BlockAttentionParams& params, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return Status("block_attention: ") + cudaGetErrorString(guard.error());
  KernelEntry kernel{};
  AttentionPlan plan{};
  const Status status = make_launch(params, device, &kernel, &plan);
  return status.empty() ? kernel.run(params, plan, stream) : status;
}

}  // namespace cfpp

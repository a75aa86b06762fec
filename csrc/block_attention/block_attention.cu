// Entry point of block_attention on CUDA: what it serves, which kernel a device gets, and the plan of the launch.
#include <algorithm>

#include "block_attention/kernels.h"
#include "common/occupancy.cuh"

namespace cfpp {
namespace {

// Waves of pieces: what more of them gain in balance they lose in traffic of partial results.
constexpr int kMaxWaves = 2;

struct Choice {
  Status (*shape)(const BlockAttentionParams& params, int device, KernelShape* shape);
  Status (*run)(const BlockAttentionParams& params, const AttentionPlan& plan, void* stream);
};

Status check_sizes(const BlockAttentionParams& p) {
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) {
    return refuse("q", "torch.bfloat16 or torch.float16", name_of(p.dtype));
  }
  if (p.head_dim != 64 && p.head_dim != 128) return refuse("head_dim", "64 or 128", std::to_string(p.head_dim));
  // Kernels look for the largest logit before they scale it.
  if (!(p.scale > 0.f)) return refuse("scale", "above 0", std::to_string(p.scale));
  constexpr int64_t kMost = int64_t{1} << 30;  // leaves room to round up, in int32
  if (p.capacity > kMost) return refuse("capacity", "at most 2^30", std::to_string(p.capacity));
  const int64_t rows = p.batch * p.heads * p.queries;
  if (rows > kMost) return refuse("B * H * Sq", "at most 2^30", std::to_string(rows));
  return {};
}

// Whether this build has code for sm_90a: Hopper's instructions exist under that name only.
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

Status make_launch(const BlockAttentionParams& p, int device, Choice* choice, AttentionPlan* plan) {
  Status status = check_sizes(p);
  if (!status.empty()) return status;
  int major = 0;
  const cudaError_t error = device_attribute(cudaDevAttrComputeCapabilityMajor, device, &major);
  if (error != cudaSuccess) return Status("block_attention: ") + cudaGetErrorString(error);
  *choice = {sm80_shape, block_attention_sm80};
  if (major == 9 && has_hopper_code()) *choice = {sm90_shape, block_attention_sm90};
  KernelShape shape;
  status = choice->shape(p, device, &shape);
  if (!status.empty()) return status;
  const auto plan_with = [&](int max_splits) {
    return make_plan(p.batch, p.heads, p.groups, p.queries_per_group(), shape.tile_rows, shape.ctas, max_splits);
  };
  const int rest = plan_with(1).tiles() % shape.ctas;
  *plan = plan_with(rest == 0 ? 1 : std::min(kMaxSplits, kMaxWaves * shape.ctas / rest));
  return {};
}

}  // namespace

Status block_attention_workspace(const BlockAttentionParams& params, int device, int64_t* bytes) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return Status("block_attention: ") + cudaGetErrorString(guard.error());
  Choice choice{};
  AttentionPlan plan{};
  const Status status = make_launch(params, device, &choice, &plan);
  *bytes = status.empty() ? plan.workspace_bytes(static_cast<int>(params.head_dim)) : 0;
  return status;
}

Status block_attention_cuda(const BlockAttentionParams& params, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return Status("block_attention: ") + cudaGetErrorString(guard.error());
  Choice choice{};
  AttentionPlan plan{};
  const Status status = make_launch(params, device, &choice, &plan);
  return status.empty() ? choice.run(params, plan, stream) : status;
}

}  // namespace cfpp

// Merges the partial results of split tiles of block_attention.
// One CTA: rows of one split tile, D / 4 threads per row and 4 channels each. It takes the largest of the row's maxima,
//   then adds the weighted sums in slot order, so that the result does not depend on which piece finished first.
// What binds: reading splits * (D + 2) floats per row, most of them still in L2.
#include "block_attention/combine.cuh"
#include "block_attention/kernels.h"
#include "common/ptx.cuh"

namespace cfpp {
namespace {

constexpr int kThreads = 256;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ BlockAttentionParams p, const __grid_constant__ AttentionPlan plan) {
  constexpr int kRowThreads = kHeadDim / 4, kRows = kThreads / kRowThreads;
  const WorkItem tile = plan.split_tile(blockIdx.x);
  const int row = blockIdx.y * kRows + threadIdx.x / kRowThreads, channel = 4 * (threadIdx.x % kRowThreads);
  if (row >= plan.tile_rows || tile.row + row >= p.queries_per_group()) return;

  float max = -INFINITY;
  for (int s = 0; s < tile.splits; ++s) max = fmaxf(max, partial_result(p, plan, tile.slot + s).max[row]);
  float sum = 0.f;
  float4 out = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int s = 0; s < tile.splits; ++s) {
    const PartialResult partial = partial_result(p, plan, tile.slot + s);
    const float weight = exp2_approx(partial.max[row] - max);
    const float4 x = *reinterpret_cast<const float4*>(partial.out + row * kHeadDim + channel);
    sum = fmaf(weight, partial.sum[row], sum);
    out = make_float4(fmaf(weight, x.x, out.x), fmaf(weight, x.y, out.y), fmaf(weight, x.z, out.z),
                      fmaf(weight, x.w, out.w));
  }
  const float inverse = 1.f / sum;
  const int64_t query = tile.batch * p.queries + tile.group * p.queries_per_group() + tile.row + row;
  T* to = static_cast<T*>(p.out_ptr) + (query * p.heads + tile.head) * kHeadDim + channel;
  *reinterpret_cast<uint2*>(to) =
      make_uint2(pack_2<T>(out.x * inverse, out.y * inverse), pack_2<T>(out.z * inverse, out.w * inverse));
}

template <typename T, int kHeadDim>
cudaError_t launch_combine(const BlockAttentionParams& p, const AttentionPlan& plan, void* stream) {
  const int rows_per_cta = kThreads / (kHeadDim / 4);
  const dim3 grid(plan.split_tiles(), ceil_div(plan.tile_rows, rows_per_cta));
  return launch(combine_kernel<T, kHeadDim>, grid, kThreads, 0, static_cast<cudaStream_t>(stream), p, plan);
}

template <typename T>
cudaError_t launch_for(const BlockAttentionParams& p, const AttentionPlan& plan, void* stream) {
  return p.head_dim == 64 ? launch_combine<T, 64>(p, plan, stream) : launch_combine<T, 128>(p, plan, stream);
}

}  // namespace

Status combine(const BlockAttentionParams& params, const AttentionPlan& plan, void* stream) {
  if (plan.split_tiles() == 0) return {};
  const cudaError_t error = params.dtype == DType::kBFloat16 ? launch_for<__nv_bfloat16>(params, plan, stream)
                                                             : launch_for<__half>(params, plan, stream);
  if (error == cudaSuccess) return {};
  return "block_attention: combine kernel, " + std::to_string(plan.split_tiles()) + " tiles in " +
         std::to_string(plan.splits) + " pieces: " + cudaGetErrorString(error);
}

}  // namespace cfpp

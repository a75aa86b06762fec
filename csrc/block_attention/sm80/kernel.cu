// block_attention for compute capability 8.0 and newer, on mma.sync and cp.async.
// One CTA of a persistent grid: the work items of plan.h that are its own, one by one. Shared memory has Q of the item
// and
//   two stages of K and V: while one tile of keys is in use the next one is loaded, and one barrier per tile serves
//   both directions. Every warp has its own rows of Q and of the output and meets all keys, so warps exchange nothing
//   else.
// What binds: the tensor cores, 4 D FLOPs per query and key; then shared memory reads, since every warp reads all of K
//   and V into its registers.
// Assumes: 16-byte aligned rows; ranges as in block_attention.h, else it traps. cp.async fills rows past a range's end
//   with zeros, so nothing outside a range is ever multiplied.
#include "block_attention/combine.cuh"
#include "block_attention/kernels.h"
#include "block_attention/sm80/mma.cuh"
#include "block_attention/sm80/softmax.cuh"
#include "common/occupancy.cuh"
#include "common/token_ranges.cuh"

namespace cfpp {
namespace {

constexpr int kStages = 2;  // of K and V, used alternately

// Each warp computes 16 * kRowTiles_ queries against kKvRows_ keys at a time.
template <int kHeadDim_, int kWarps, int kRowTiles_, int kKvRows_, int kCtasPerSm_>
struct TileShape {
  static constexpr int kHeadDim = kHeadDim_, kRowTiles = kRowTiles_, kKvRows = kKvRows_, kCtasPerSm = kCtasPerSm_;
  static constexpr int kThreads = kWarpSize * kWarps, kRows = 16 * kRowTiles * kWarps;
  static constexpr int kQueryBytes = 2 * kRows * kHeadDim, kKvBytes = 2 * kKvRows * kHeadDim;
  static constexpr int kSharedBytes = kQueryBytes + kStages * 2 * kKvBytes;
};

// Two row tiles per warp halve the shared memory reads per product, but need 4 warps and thus two CTAs on an SM to fill
// it. At head_dim 128 that takes 130 KiB of shared memory, which 8.6, 8.9 and 12.x do not have; their tensor cores are
// also slower against their shared memory, so there 8 warps of one row tile do.
using Shape64 = TileShape<64, 4, 2, 64, 2>;               // 48 KiB
using Shape128 = TileShape<128, 4, 2, 32, 2>;             // 64 KiB
using Shape128SmallShared = TileShape<128, 8, 1, 64, 1>;  // 96 KiB

// The finished rows of this warp go through its rows of Q's tile, so that they leave in pieces of 16 bytes.
template <typename T, typename Shape>
__device__ __forceinline__ void store_rows(const BlockAttentionParams& p, const WorkItem& item, unsigned char* tile,
                                           const float (&out)[Shape::kRowTiles][Shape::kHeadDim / 8][4],
                                           const OnlineSoftmax<Shape::kRowTiles>& softmax) {
  constexpr int kHeadDim = Shape::kHeadDim, kChunks = kHeadDim / kChunk, kRowsAtOnce = kWarpSize / kChunks;
  const int lane = threadIdx.x % kWarpSize, first = threadIdx.x / kWarpSize * 16 * Shape::kRowTiles;
#pragma unroll
  for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 16 * m + 8 * half + lane / 4;
      const float inverse = 1.f / quad_sum(softmax.sum[m][half]);
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        const uint32_t pair = pack_2<T>(out[m][n][2 * half] * inverse, out[m][n][2 * half + 1] * inverse);
        *reinterpret_cast<uint32_t*>(tile + chunk_offset<kHeadDim>(row, n) + 4 * (lane % 4)) = pair;
      }
    }
  }
  __syncwarp();
  const int64_t query = item.batch * p.queries + item.group * p.queries_per_group() + item.row;
  const int rows = static_cast<int>(p.queries_per_group()) - item.row;  // that exist in this tile, if below kRows
  T* to = static_cast<T*>(p.out_ptr) + (query * p.heads + item.head) * kHeadDim + lane % kChunks * kChunk;
#pragma unroll 4
  for (int i = 0; i < 16 * Shape::kRowTiles / kRowsAtOnce; ++i) {
    const int row = first + i * kRowsAtOnce + lane / kChunks;
    const uint4 chunk = *reinterpret_cast<const uint4*>(tile + chunk_offset<kHeadDim>(row, lane % kChunks));
    if (row < rows) *reinterpret_cast<uint4*>(to + row * p.heads * kHeadDim) = chunk;
  }
}

template <typename Shape>
__device__ __forceinline__ void store_partial(const PartialResult& partial,
                                              const float (&out)[Shape::kRowTiles][Shape::kHeadDim / 8][4],
                                              const OnlineSoftmax<Shape::kRowTiles>& softmax) {
  const int lane = threadIdx.x % kWarpSize, first = threadIdx.x / kWarpSize * 16 * Shape::kRowTiles;
#pragma unroll
  for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 16 * m + 8 * half + lane / 4;
      const float sum = quad_sum(softmax.sum[m][half]);
      if (lane % 4 == 0) {
        partial.max[row] = softmax.max[m][half];
        partial.sum[row] = sum;
      }
      float* to = partial.out + row * Shape::kHeadDim + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < Shape::kHeadDim / 8; ++n) {
        *reinterpret_cast<float2*>(to + 8 * n) = make_float2(out[m][n][2 * half], out[m][n][2 * half + 1]);
      }
    }
  }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kCtasPerSm)
    block_attention_sm80_kernel(const __grid_constant__ BlockAttentionParams p,
                                const __grid_constant__ AttentionPlan plan) {
  constexpr int kHeadDim = Shape::kHeadDim, kRowTiles = Shape::kRowTiles, kKvRows = Shape::kKvRows;
  unsigned char* const shared = dynamic_shared();
  const uint32_t q_tile = shared_address(shared), kv_tiles = q_tile + Shape::kQueryBytes;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const uint32_t q_lane = down_then_right<kHeadDim>(q_tile + 2 * kHeadDim * 16 * kRowTiles * warp, lane);
  const uint32_t k_lane = right_then_down<kHeadDim>(kv_tiles, lane);
  const uint32_t v_lane = down_then_right<kHeadDim>(kv_tiles + Shape::kKvBytes, lane);
  const float scale_log2 = p.scale * kLog2E;

  for (int index = blockIdx.x; index < plan.items(); index += gridDim.x) {
    const WorkItem item = plan.item(index);
    const int range_count = static_cast<int>(p.ranges);
    const int32_t* ranges = p.ranges_ptr + (item.batch * p.groups + item.group) * p.ranges * 2;
    RangeWalker walker(ranges, range_count, kKvRows, Tail::kClip);
    for (int r = 0; r < range_count; ++r) check_range(ranges[2 * r], ranges[2 * r + 1], p.capacity);
    const int tiles = walker.tiles();
    if (tiles == 0) __trap();
    const int first_tile = item.first_kv_tile(tiles), last_tile = item.last_kv_tile(tiles);
    walker.seek(first_tile);
    const T* k = static_cast<const T*>(p.k_ptr) + item.batch * p.k_stride[0] + item.head * p.k_stride[1];
    const T* v = static_cast<const T*>(p.v_ptr) + item.batch * p.v_stride[0] + item.head * p.v_stride[1];
    int coming_end = 0;
    const auto load_next_into = [&](int stage) {
      const KvTile coming = walker.next();
      coming_end = coming.end;
      const uint32_t to = kv_tiles + stage * 2 * Shape::kKvBytes;
      load_rows<kHeadDim, kKvRows, Shape::kThreads>(to, k + coming.row * p.k_stride[2], p.k_stride[2], coming.end);
      load_rows<kHeadDim, kKvRows, Shape::kThreads>(to + Shape::kKvBytes, v + coming.row * p.v_stride[2], p.v_stride[2],
                                                    coming.end);
      cp_async_commit();
    };

    OnlineSoftmax<kRowTiles> softmax;
    float out[kRowTiles][kHeadDim / 8][4] = {};
    __syncthreads();  // the item before is done with shared memory
    if (first_tile < last_tile) {
      const int64_t query = item.group * p.queries_per_group() + item.row;
      const T* q = static_cast<const T*>(p.q_ptr) + item.batch * p.q_stride[0] + item.head * p.q_stride[1];
      load_rows<kHeadDim, Shape::kRows, Shape::kThreads>(q_tile, q + query * p.q_stride[2], p.q_stride[2],
                                                         static_cast<int>(p.queries_per_group()) - item.row);
      load_next_into(0);
    }
    int stage = 0;
    for (int left = last_tile - first_tile; left > 0; --left, stage ^= 1) {
      const int end = coming_end;
      cp_async_wait<0>();
      __syncthreads();  // this tile is here, and nobody reads the one before any more
      if (left > 1) load_next_into(stage ^ 1);
      const uint32_t stage_bytes = stage * 2 * Shape::kKvBytes;
      float logits[kRowTiles][kKvRows / 8][4];
      multiply_qk<kHeadDim, T>(logits, q_lane, k_lane + stage_bytes);
      if (end < kKvRows) mask_keys(logits, end, lane);
      softmax.step(logits, out, scale_log2);
      multiply_pv<kHeadDim, T>(out, logits, v_lane + stage_bytes);
    }
    derive_again(index);  // rather than keep the item in registers through the loop: Shape128 has none to spare
    const WorkItem done = plan.item(index);
    if (done.slot < 0) {
      store_rows<T, Shape>(p, done, shared, out, softmax);
    } else {
      store_partial<Shape>(partial_result(p, plan, done.slot), out, softmax);
    }
  }
}

using Kernel = void (*)(BlockAttentionParams, AttentionPlan);

struct Variant {
  Kernel kernel;
  int threads, rows, shared_bytes;
};

template <typename T, typename Shape>
Variant variant() {
  return {block_attention_sm80_kernel<T, Shape>, Shape::kThreads, Shape::kRows, Shape::kSharedBytes};
}

template <typename T>
Variant variant_for(int64_t head_dim, int shared_per_sm) {
  constexpr int kReserved = 1024;  // of an SM's shared memory, per CTA
  if (head_dim == 64) return variant<T, Shape64>();
  const bool fits = Shape128::kCtasPerSm * (Shape128::kSharedBytes + kReserved) <= shared_per_sm;
  return fits ? variant<T, Shape128>() : variant<T, Shape128SmallShared>();
}

cudaError_t find_variant(const BlockAttentionParams& p, int device, Variant* found, int* ctas) {
  int shared_per_sm = 0;
  const cudaError_t error = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device, &shared_per_sm);
  if (error != cudaSuccess) return error;
  *found = p.dtype == DType::kBFloat16 ? variant_for<__nv_bfloat16>(p.head_dim, shared_per_sm)
                                       : variant_for<__half>(p.head_dim, shared_per_sm);
  return resident_ctas(found->kernel, found->threads, found->shared_bytes, device, ctas);
}

}  // namespace

Status sm80_occupancy(const BlockAttentionParams& params, int device, Occupancy* occupancy) {
  Variant variant{};
  const cudaError_t error = find_variant(params, device, &variant, &occupancy->ctas);
  occupancy->tile_rows = variant.rows;
  return error == cudaSuccess ? Status{} : Status("block_attention: sm_80 kernel: ") + cudaGetErrorString(error);
}

Status block_attention_sm80(const BlockAttentionParams& params, const AttentionPlan& plan, void* stream) {
  Status status = check_alignment(params, plan);
  if (!status.empty()) return status;
  int device = 0, ctas = 0;
  Variant variant{};
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = find_variant(params, device, &variant, &ctas);
  if (error == cudaSuccess) {
    error = launch(variant.kernel, plan.ctas, variant.threads, variant.shared_bytes, static_cast<cudaStream_t>(stream),
                   params, plan);
  }
  if (error != cudaSuccess) {
    return "block_attention: sm_80 kernel, " + std::to_string(plan.ctas) + " ctas of " +
           std::to_string(variant.threads) + " threads and " + std::to_string(variant.shared_bytes) +
           " bytes of shared memory: " + cudaGetErrorString(error);
  }
  return combine(params, plan, stream);
}

}  // namespace cfpp

// block_attention on Hopper (sm_90a). docs/attention_kernel.md explains the design.
// One CTA per SM, persistent: a producer warpgroup that loads by TMA and two consumer warpgroups that multiply by
// wgmma. What binds: the tensor cores at head_dim 128; the exponentials (MUFU) at 64. Assumes: compute capability 9.0,
// 16-byte aligned rows, a scale above 0, ranges as in block_attention.h, else it traps.
#include "block_attention/kernels.h"
#include "block_attention/sm90/consumer.cuh"
#include "block_attention/sm90/producer.cuh"
#include "common/occupancy.cuh"

namespace cfpp {
namespace sm90 {
namespace {

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    block_attention_sm90_kernel(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                                const __grid_constant__ TensorMap v_map, const __grid_constant__ BlockAttentionParams p,
                                const __grid_constant__ AttentionPlan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(CFPP_EMULATE)
  Shared<kHeadDim>& shared = Shared<kHeadDim>::get();
  if (threadIdx.x == 0) shared.init();
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);  // ptxas sees that a warp agrees on it
  if (warpgroup == 0) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x < kWarpSize && elect_one()) produce(shared, q_map, k_map, v_map, p, plan);
  } else {
    take_registers<kConsumerRegisters>();
    Consumer<T, kHeadDim>(warpgroup - 1, shared, p, plan).run();
  }
#else
  __trap();
#endif
}

#ifdef CFPP_EMULATE
Status encode_fitting(const TensorMapArguments& arguments, TensorMap* map) {
  *map = arguments;
  return {};
}
#else
struct Encoder {
  decltype(&cuTensorMapEncodeTiled) function = nullptr;
  Status status;
};

// Found through the driver at run time: linking libcuda would keep the module from importing where there is no driver.
Encoder find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return {nullptr, cudaGetErrorString(error)};
  if (found != cudaDriverEntryPointSuccess || function == nullptr) return {nullptr, "the driver does not have it"};
  return {reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function), {}};
}

Status encode_fitting(const TensorMapArguments& arguments, TensorMap* map) {
  static const Encoder encoder = find_encoder();
  if (!encoder.status.empty()) return "cuTensorMapEncodeTiled: " + encoder.status;
  constexpr cuuint32_t kSteps[] = {1, 1, 1, 1, 1};
  // Of float16 too: values are moved as they are, and rows beyond the tensor are zeros in both.
  const CUresult result = encoder.function(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, TensorMapArguments::kRank, const_cast<void*>(arguments.address),
      arguments.sizes, arguments.strides_bytes, arguments.box, kSteps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? Status{} : "cuTensorMapEncodeTiled: CUDA driver error " + std::to_string(result);
}
#endif

Status encode(const char* name, const TensorMapArguments& arguments, TensorMap* map) {
  Status status = tensor_map_fault(arguments);
  if (status.empty()) status = encode_fitting(arguments, map);
  return status.empty() ? status : std::string("block_attention: ") + name + ": " + status;
}

template <typename T, int kHeadDim>
Status run(const BlockAttentionParams& p, const AttentionPlan& plan, cudaStream_t stream) {
  TensorMap maps[3];
  Status status = encode("q", tile_map(p.q_ptr, p.batch, p.heads, p.queries, kHeadDim, p.q_stride, kRows), &maps[0]);
  if (status.empty()) {
    status = encode("k_cache", tile_map(p.k_ptr, p.batch, p.heads, p.capacity, kHeadDim, p.k_stride, kKeys), &maps[1]);
  }
  if (status.empty()) {
    status = encode("v_cache", tile_map(p.v_ptr, p.batch, p.heads, p.capacity, kHeadDim, p.v_stride, kKeys), &maps[2]);
  }
  if (!status.empty()) return status;
  const auto kernel = block_attention_sm90_kernel<T, kHeadDim>;
  constexpr int kBytes = Shared<kHeadDim>::bytes();
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error == cudaSuccess) {
    launch(kernel, plan.ctas, kThreads, kBytes, stream, maps[0], maps[1], maps[2], p, plan);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? Status{} : Status("block_attention: ") + cudaGetErrorString(error);
}

}  // namespace
}  // namespace sm90

Status sm90_occupancy(const BlockAttentionParams&, int device, Occupancy* occupancy) {
  occupancy->tile_rows = sm90::kRows;
  const cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, device, &occupancy->ctas);
  return error == cudaSuccess ? Status{} : Status("block_attention: ") + cudaGetErrorString(error);
}

Status block_attention_sm90(const BlockAttentionParams& p, const AttentionPlan& plan, void* stream) {
  Status status = check_alignment(p, plan);
  if (!status.empty()) return status;
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    return p.head_dim == 128 ? sm90::run<T, 128>(p, plan, cuda_stream) : sm90::run<T, 64>(p, plan, cuda_stream);
  };
  status = p.dtype == DType::kBFloat16 ? run(__nv_bfloat16{}) : run(__half{});
  return status.empty() ? combine(p, plan, stream) : status;
}

}  // namespace cfpp

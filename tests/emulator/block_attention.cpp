// Lets Python run the CUDA kernels of block_attention on the host.
#include <string>

#include "block_attention/kernels.h"
#include "emulator/cuda_runtime.h"

namespace {

// With a plan of the caller's choice instead of the dispatcher's.
cfpp::Status run_planned(const cfpp::BlockAttentionParams& p, int device, int ctas, int splits,
                         int64_t workspace_bytes) {
  cfpp::Occupancy occupancy;
  const bool hopper = kEmulatedDevices[device].major == 9;
  const cfpp::Status status =
      hopper ? cfpp::sm90_occupancy(p, device, &occupancy) : cfpp::sm80_occupancy(p, device, &occupancy);
  if (!status.empty()) return status;
  cfpp::AttentionPlan plan =
      cfpp::make_plan(p.batch, p.heads, p.groups, p.queries_per_group(), occupancy.tile_rows, ctas, 1);
  plan.splits = splits;
  const int64_t wanted = plan.workspace_bytes(static_cast<int>(p.head_dim));
  if (wanted > workspace_bytes) return "workspace of " + std::to_string(wanted) + " bytes wanted";
  return hopper ? cfpp::block_attention_sm90(p, plan, nullptr) : cfpp::block_attention_sm80(p, plan, nullptr);
}

// Kernels may read the rows of q and of the caches, and nothing else of the buffers that these are views of.
void allow_rows(const cfpp::BlockAttentionParams& p, const void* pointer, const int64_t* stride, int64_t rows) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads; ++h) {
      const auto* first = static_cast<const unsigned char*>(pointer) + 2 * (b * stride[0] + h * stride[1]);
      emulator::readable.emplace_back(first, first + 2 * ((rows - 1) * stride[2] + p.head_dim));
    }
  }
}

}  // namespace

// Returns null, or what went wrong. device: a row of kEmulatedDevices. ctas 0: the dispatcher decides.
extern "C" const char* emulate_block_attention(const cfpp::BlockAttentionParams* params, int device, int ctas,
                                               int splits, int64_t workspace_bytes, uint64_t seed) {
  static std::string message;
  emulator::seed = seed;
  emulator::readable.clear();
  allow_rows(*params, params->q_ptr, params->q_stride, params->queries);
  allow_rows(*params, params->k_ptr, params->k_stride, params->capacity);
  allow_rows(*params, params->v_ptr, params->v_stride, params->capacity);
  cudaSetDevice(device);
  try {
    if (ctas > 0) {
      message = run_planned(*params, device, ctas, splits, workspace_bytes);
    } else {
      int64_t wanted = 0;
      message = cfpp::block_attention_workspace(*params, device, &wanted);
      if (message.empty() && wanted > workspace_bytes)
        message = "workspace of " + std::to_string(wanted) + " bytes wanted";
      if (message.empty()) message = cfpp::block_attention_cuda(*params, device, nullptr);
    }
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.empty() ? nullptr : message.c_str();
}

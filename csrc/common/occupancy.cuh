// Properties of devices and kernels that launchers need on every call, queried from CUDA once per device.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "common/device.cuh"

namespace cfpp {

// Returns an attribute of a device; cached.
inline cudaError_t device_attribute(cudaDeviceAttr attribute, int device, int* value) {
  static std::mutex mutex;
  static std::map<std::pair<cudaDeviceAttr, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(attribute, device);
  const auto found = known.find(key);
  if (found != known.end()) {
    *value = found->second;
    return cudaSuccess;
  }
  const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device);
  if (error == cudaSuccess) known[key] = *value;
  return error;
}

// Returns how many CTAs of `kernel` run at once on the current device, number `device`, all SMs together. Lifts the
// kernel's limit on dynamic shared memory first. Both happen once per kernel and device, so launches may be captured
// after the first call.
template <typename Kernel>
cudaError_t resident_ctas(Kernel kernel, int threads, int shared_bytes, int device, int* ctas) {
  static std::mutex mutex;
  static std::map<std::pair<Kernel, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(kernel, device);
  const auto found = known.find(key);
  if (found != known.end()) {
    *ctas = found->second;
    return cudaSuccess;
  }
  int sms = 0, per_sm = 0;
  cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, device, &sms);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, shared_bytes);
  }
  if (error == cudaSuccess && per_sm == 0) error = cudaErrorLaunchOutOfResources;
  if (error == cudaSuccess) known[key] = *ctas = sms * per_sm;
  return error;
}

}  // namespace cfpp

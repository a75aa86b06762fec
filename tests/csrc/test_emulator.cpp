// The emulator detects what fails on a GPU: kernels with one fault each, and a correct one that must pass.
#include "common/ptx.cuh"
#include "csrc/check.h"

using namespace cfpp;

constexpr int kThreads = 64, kSharedBytes = 1024;
constexpr unsigned kAll = 0xffffffffu;

alignas(16) static float source[kThreads * 4];

// Each thread takes what another one wrote.
__global__ void mirror(float* out, bool barrier) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// Copies 16 bytes per thread, the second half of them as zeros, and reads before or after they are there.
__global__ void copy(float* out, bool wait) {
  const auto* shared = reinterpret_cast<const float*>(dynamic_shared()) + 4 * threadIdx.x;
  cp_async_16(shared_address(shared), source + 4 * threadIdx.x, 8);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  out[threadIdx.x] = shared[1] + shared[3];
}

__global__ void copy_to(uint32_t address) { cp_async_16(address, source, 16); }
__global__ void copy_from(const void* from) { cp_async_16(0, from, 16); }

__global__ void diverge() {
  if (threadIdx.x % 2) {
    __syncwarp();
  } else {
    __shfl_xor_sync(kAll, 1, 1);
  }
}

__global__ void leave_early() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void disagree() { emulator::barrier_sync(1, threadIdx.x < 32 ? 64 : 32); }

__global__ void write_past_the_end() { dynamic_shared()[kSharedBytes + threadIdx.x] = 0; }

__global__ void sum_lanes(float* out) {
  float sum = static_cast<float>(threadIdx.x % 32);
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(kAll, sum, lane);
  out[threadIdx.x] = sum + static_cast<float>(__any_sync(kAll, threadIdx.x == 40));
}

template <typename Kernel, typename... Args>
std::string fault_of(Kernel kernel, Args... args) {
  try {
    launch(kernel, 2, kThreads, kSharedBytes, nullptr, args...);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "none";
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

int main() {
  for (float& x : source) x = 3.f;
  float out[kThreads];
  bool mirrored_wrongly = false;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    emulator::seed = seed;
    const std::string context = "seed " + std::to_string(seed);
    CHECK(fault_of(mirror, out, true) == "none", context);
    for (int t = 0; t < kThreads; ++t) CHECK(out[t] == static_cast<float>(kThreads - 1 - t), context);
    fault_of(mirror, out, false);
    for (int t = 0; t < kThreads; ++t) mirrored_wrongly = mirrored_wrongly || std::isnan(out[t]);
    CHECK(fault_of(copy, out, true) == "none", context);
    for (int t = 0; t < kThreads; ++t) CHECK(out[t] == 3.f, context);
    fault_of(copy, out, false);
    for (int t = 0; t < kThreads; ++t) CHECK(std::isnan(out[t]), context);
    CHECK(fault_of(sum_lanes, out) == "none" && out[0] == 496.f && out[63] == 497.f, context);

    std::string fault = fault_of(copy_to, uint32_t{8});
    CHECK(contains(fault, "misaligned"), fault);
    fault = fault_of(copy_to, uint32_t{kSharedBytes});
    CHECK(contains(fault, "out of bounds"), fault);
    fault = fault_of(copy_from, static_cast<const void*>(source + 1));
    CHECK(contains(fault, "misaligned"), fault);
    emulator::readable = {{reinterpret_cast<unsigned char*>(source), reinterpret_cast<unsigned char*>(source + 8)}};
    fault = fault_of(copy_from, static_cast<const void*>(source + 4));
    CHECK(fault == "none", fault);
    fault = fault_of(copy_from, static_cast<const void*>(source + 8));
    CHECK(contains(fault, "reads global memory out of bounds"), fault);
    emulator::readable.clear();
    fault = fault_of(diverge);
    CHECK(contains(fault, "others of its warp are at"), fault);
    fault = fault_of(leave_early);
    CHECK(contains(fault, "1 at (returned)") && contains(fault, "63 at barrier 0"), fault);
    fault = fault_of(disagree);
    CHECK(contains(fault, "barrier 1"), fault);
    fault = fault_of(write_past_the_end);
    CHECK(contains(fault, "past the end"), fault);
  }
  CHECK(mirrored_wrongly, "a missing barrier must show under some seed");
}

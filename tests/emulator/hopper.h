// csrc/common/hopper.cuh on the host: same names, the documented semantics, and every delay that the documents allow.
// TMA lands in pieces at random moments and its target is NaN until then. wgmma runs at a random moment after it was
// committed and reads shared memory only then; its accumulators are NaN until they have been waited for. It sees
// ordinary writes to shared memory only once they are fenced.
#pragma once

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "block_attention/sm90/descriptor.h"
#include "core.h"
#include "wgmma.h"

namespace cfpp {

using TensorMap = TensorMapArguments;

struct Barrier {
  uint64_t state;  // unused: the emulation keeps its own
};

}  // namespace cfpp

namespace emulator {

struct MBarrier {
  std::string name;
  int arrivals = 0, missing = 0;
  int64_t bytes = 0;  // announced, not yet there
  int phases = 0;     // that have ended
  std::vector<Thread*> sleepers;
};

struct Hopper {
  std::map<uint32_t, MBarrier> barriers;
  std::map<int, std::string> waits;  // per thread
  std::map<int, int> registers;      // per warpgroup, where it changed them
};

inline Hopper& hopper() { return state<Hopper>(); }

// ---- mbarriers ----

inline MBarrier& barrier_at(uint32_t address) {
  const auto found = hopper().barriers.find(address);
  if (found == hopper().barriers.end()) fail("no barrier was initialised at " + std::to_string(address));
  return found->second;
}

inline void end_phase_if_complete(MBarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes > 0) return;
  barrier.missing = barrier.arrivals;
  ++barrier.phases;
  cta().wake(barrier.sleepers);
}

inline void arrive(uint32_t address, int64_t bytes) {
  MBarrier& barrier = barrier_at(address);
  if (barrier.missing == 0) fail(barrier.name + ": one arrival too many in phase " + std::to_string(barrier.phases));
  --barrier.missing;
  barrier.bytes += bytes;
  end_phase_if_complete(barrier);
}

inline void deliver(uint32_t address, int64_t bytes) {
  MBarrier& barrier = barrier_at(address);
  barrier.bytes -= bytes;
  if (barrier.bytes < 0) fail(barrier.name + ": more bytes than announced in phase " + std::to_string(barrier.phases));
  end_phase_if_complete(barrier);
}

// ---- TMA ----

// Slab `slab` of a box: that index of dimension 2, all of dimensions 0 and 1.
inline void load_slab(uint32_t to, const cfpp::TensorMapArguments& map, const int (&start)[5], uint32_t slab) {
  const uint32_t row_bytes = 2 * map.box[0];
  for (uint32_t row = 0; row < map.box[1]; ++row) {
    const int64_t at[] = {start[0], start[1] + int64_t{row}, start[2] + int64_t{slab}, start[3], start[4]};
    const unsigned char* from = static_cast<const unsigned char*>(map.address) + 2 * at[0];
    bool inside = at[0] >= 0 && at[0] + map.box[0] <= static_cast<int64_t>(map.sizes[0]);
    for (int i = 1; i < 5; ++i) {
      inside = inside && at[i] >= 0 && at[i] < static_cast<int64_t>(map.sizes[i]);
      from += at[i] * static_cast<int64_t>(map.strides_bytes[i - 1]);
    }
    for (uint32_t chunk = 0; chunk < row_bytes; chunk += 16) {
      const uint32_t target = swizzled(to + (slab * map.box[1] + row) * row_bytes + chunk);
      for (unsigned char* view : {cta().shared, async_view()}) {
        std::memset(view + target, 0, 16);
        if (inside) std::memcpy(view + target, from + chunk, 16);
      }
    }
  }
}

}  // namespace emulator

namespace cfpp {

inline bool elect_one() {
  struct Lane {
    bool elected;
  } mine{};
  emulator::meet(emulator::my_warp(), "elect.sync", &mine,
                 [](Lane** all) { all[emulator::random_bits() % emulator::kWarp]->elected = true; });
  return mine.elected;
}

// In messages a barrier is called what the kernel calls it; those of one name are numbered.
#define barrier_init(barrier, arrivals) barrier_init_as(#barrier, barrier, arrivals)
inline void barrier_init_as(const std::string& name, Barrier& barrier, int arrivals) {
  const uint32_t address = shared_address(&barrier);
  int number = 0;
  for (const auto& [at, known] : emulator::hopper().barriers) number += known.name.rfind(name + " #", 0) == 0;
  emulator::MBarrier fresh;
  fresh.name = name + " #" + std::to_string(number);
  fresh.arrivals = fresh.missing = arrivals;
  if (!emulator::hopper().barriers.emplace(address, fresh).second) emulator::fail(fresh.name + " initialised twice");
}

inline void barrier_init_fence() {}
inline void barrier_arrive(Barrier& barrier) { emulator::arrive(shared_address(&barrier), 0); }
inline void barrier_arrive_expecting(Barrier& barrier, uint32_t bytes) {
  emulator::arrive(shared_address(&barrier), bytes);
}

// Looks at the parity only when it runs: a phase that came and went meanwhile is missed, as by the hardware.
inline void barrier_wait(Barrier& barrier, int parity) {
  emulator::MBarrier& it = emulator::barrier_at(shared_address(&barrier));
  while ((it.phases & 1) == parity) {
    std::string& text = emulator::hopper().waits[emulator::thread().rank];
    text = "warpgroup " + std::to_string(emulator::thread().rank / emulator::kWarpgroup) + ": " + it.name + " phase " +
           std::to_string(it.phases);
    emulator::sleep_in(it.sleepers, text.c_str());
  }
}

inline void tma_prefetch_map(const TensorMap&) {}

inline void tma_load(void* tile, const TensorMap& map, Barrier& barrier, int c0, int c1, int c2, int c3, int c4,
                     uint64_t) {
  const uint32_t to = shared_address(tile), at = shared_address(&barrier);
  const uint32_t slab_bytes = map.box_bytes() / map.box[2];
  if (to % kSwizzleBytes != 0) emulator::fail("tma: the tile is not aligned to the swizzle pattern");
  std::memset(emulator::shared_pointer(to, map.box_bytes(), 16), emulator::kPoison, map.box_bytes());
  std::memset(emulator::async_view() + to, emulator::kPoison, map.box_bytes());
  for (uint32_t slab = 0; slab < map.box[2]; ++slab) {
    emulator::post_unit([=] {
      emulator::load_slab(to, map, {c0, c1, c2, c3, c4}, slab);
      emulator::deliver(at, slab_bytes);
    });
  }
}

inline void async_proxy_fence() {
  std::memcpy(emulator::async_view(), emulator::cta().shared, emulator::cta().shared_bytes);
}

template <int kId, int kThreads>
void named_barrier_sync() {
  emulator::barrier_sync(kId, kThreads);
}

// The register file: 64 Ki registers, of which a launch gives every thread the same multiple of 8.
inline void set_registers(int wanted, bool more) {
  int nothing = 0;
  emulator::meet(emulator::my_warpgroup(), "setmaxnreg", &nothing, [](int**) {});
  const int threads = emulator::cta().threads, launched = 65536 / threads / 8 * 8;
  const int groups = threads / emulator::kWarpgroup, mine = emulator::thread().rank / emulator::kWarpgroup;
  if (wanted % 8 || wanted < 24 || wanted > 256 || (wanted > launched) != more) {
    emulator::fail("setmaxnreg to " + std::to_string(wanted) + " from " + std::to_string(launched));
  }
  auto& registers = emulator::hopper().registers;
  const auto others = [&] {
    int sum = 0;
    for (int g = 0; g < groups; ++g) sum += g == mine ? 0 : registers.count(g) ? registers[g] : launched;
    return sum;
  };
  emulator::wait_until("setmaxnreg.inc", [&] { return (others() + wanted) * emulator::kWarpgroup <= 65536; });
  registers[mine] = wanted;
}
template <int kRegisters>
void give_registers() {
  set_registers(kRegisters, false);
}
template <int kRegisters>
void take_registers() {
  set_registers(kRegisters, true);
}

}  // namespace cfpp

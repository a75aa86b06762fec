// Runs CUDA kernels on the host: every thread of a CTA is a fiber, one CTA after the other, all on one OS thread.
// A fiber runs until it meets others (barrier, warp instruction) or waits; which one goes on next, and which CTA, is
// drawn from a seeded generator, so a missing barrier shows as a wrong result under some seed. Shared memory starts as
// NaN.
//
// What instruction emulations build on:
//   thread(), cta()                     the running thread and its CTA
//   meet(group, name, &mine, work)      blocks until the whole warp or warpgroup called it under the same name; the
//   last
//                                       one runs work(T** all), all[rank] being what each passed; may write into them
//   barrier_sync(id, count)             bar.sync with an id and a count of threads
//   wait_until(name, predicate)         yields until predicate() holds; cta().progress() whenever one may have changed
//   post(work)                          an asynchronous engine: runs work() at a random later moment, in any order
//   shared_address(pointer)             32-bit shared address; shared_pointer(address, bytes, align) checks and inverts
//   state<T>()                          one T per CTA, for whatever an emulation has to remember (mbarriers, ...)
//   check_readable(pointer, bytes)      global memory within what the test allowed by readable
//   fail(message)                       ends the launch with a std::runtime_error that names thread and CTA
// A CTA that cannot go on ends in fail() with what its threads wait for.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <typeindex>
#include <utility>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

inline uint64_t seed = 0;  // 0: threads take turns, CTAs go in order

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024, kSharedAlignment = 1024, kCanary = 256;
constexpr unsigned char kPoison = 0xff;  // NaN in every float format

struct Thread {
  dim3 index;
  int rank = 0;  // in the CTA
  const char* waits_for = nullptr;
  bool started = false, done = false;
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStack]};

  int lane() const { return rank % kWarp; }
  int warp() const { return rank / kWarp; }
};

// Threads that meet: a warp, or a warpgroup.
struct Group {
  int size;
  const char* name = nullptr;
  std::vector<void*> arguments{};
  std::vector<Thread*> sleepers{};
  int arrived = 0;
};

struct Barrier {
  int arrived = 0, count = 0;
  std::vector<Thread*> sleepers;
};

class Cta {
 public:
  dim3 grid, block, index;
  std::vector<Group> warps, warpgroups;
  Barrier barriers[16];
  std::vector<Thread*> ready;
  std::vector<std::function<void()>> posted;
  std::map<std::type_index, std::shared_ptr<void>> states;
  std::string error;
  jmp_buf scheduler;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  int threads = 0, idle_polls = 0;

  void progress() { idle_polls = 0; }
  void wake(std::vector<Thread*>& sleepers) {
    progress();
    ready.insert(ready.end(), sleepers.begin(), sleepers.end());
    sleepers.clear();
  }
};

inline Cta* running_cta = nullptr;
inline Thread* running_thread = nullptr;
inline Cta& cta() { return *running_cta; }
inline Thread& thread() { return *running_thread; }

inline uint64_t random_state = 1;
inline uint64_t random_bits() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

[[noreturn]] inline void fail(const std::string& message) {
  const dim3 block = cta().index;
  std::string where = "cta (" + std::to_string(block.x) + ", " + std::to_string(block.y) + ")";
  if (running_thread) where += " thread " + std::to_string(thread().rank);
  throw std::runtime_error(where + ": " + message);
}

template <typename T>
T& state() {
  std::shared_ptr<void>& slot = cta().states[typeid(T)];
  if (!slot) slot = std::make_shared<T>();
  return *static_cast<T*>(slot.get());
}

// ---- waiting ----

// Hands over to the scheduler; returns when this thread is picked again.
[[gnu::noinline]] inline void switch_out() {
  if (_setjmp(thread().resume) == 0) _longjmp(cta().scheduler, 1);
}

inline void sleep_in(std::vector<Thread*>& sleepers, const char* what) {
  thread().waits_for = what;
  sleepers.push_back(running_thread);
  switch_out();
  thread().waits_for = nullptr;
}

inline void yield() {
  cta().ready.push_back(running_thread);
  switch_out();
}

template <typename Predicate>
void wait_until(const char* what, Predicate&& predicate) {
  thread().waits_for = what;
  while (!predicate()) {
    ++cta().idle_polls;
    yield();
  }
  thread().waits_for = nullptr;
  cta().progress();
}

template <typename Work>
void post(Work&& work) {
  cta().posted.emplace_back(std::forward<Work>(work));
}

template <typename T, typename Work>
void meet(Group& group, const char* name, T* mine, Work&& work) {
  if (group.arrived > 0 && std::strcmp(group.name, name) != 0) {
    fail(std::string("runs ") + name + " while others of its warp are at " + group.name);
  }
  group.name = name;
  group.arguments.resize(group.size);
  group.arguments[thread().rank % group.size] = mine;
  if (++group.arrived < group.size) return sleep_in(group.sleepers, name);
  work(reinterpret_cast<T**>(group.arguments.data()));
  group.arrived = 0;
  cta().wake(group.sleepers);
  yield();
}

inline Group& my_warp() { return cta().warps.at(thread().warp()); }
inline Group& my_warpgroup() { return cta().warpgroups.at(thread().rank / 128); }

inline bool barrier_arrives_last(int id, int count) {
  if (id < 0 || id > 15) fail("barrier " + std::to_string(id) + " does not exist");
  Barrier& barrier = cta().barriers[id];
  if (count % kWarp || (barrier.arrived > 0 && barrier.count != count)) {
    fail("barrier " + std::to_string(id) + " with " + std::to_string(count) + " threads, others said " +
         std::to_string(barrier.count));
  }
  barrier.count = count;
  if (++barrier.arrived < count) return false;
  barrier.arrived = 0;
  cta().wake(barrier.sleepers);
  return true;
}

inline void barrier_sync(int id, int count) {
  static const char* const names[16] = {
      "barrier 0", "barrier 1", "barrier 2",  "barrier 3",  "barrier 4",  "barrier 5",  "barrier 6",  "barrier 7",
      "barrier 8", "barrier 9", "barrier 10", "barrier 11", "barrier 12", "barrier 13", "barrier 14", "barrier 15"};
  if (barrier_arrives_last(id, count)) return yield();
  sleep_in(cta().barriers[id].sleepers, names[id]);
}

// ---- shared memory ----

inline uint32_t shared_address(const void* pointer) {
  const auto* byte = static_cast<const unsigned char*>(pointer);
  if (byte < cta().shared || byte > cta().shared + cta().shared_bytes) fail("not an address of dynamic shared memory");
  return static_cast<uint32_t>(byte - cta().shared);
}

inline unsigned char* shared_pointer(uint32_t address, size_t bytes, size_t align) {
  if (address % align || address + bytes > cta().shared_bytes) {
    fail("shared access of " + std::to_string(bytes) + " bytes at " + std::to_string(address) + " of " +
         std::to_string(cta().shared_bytes) + (address % align ? ", misaligned" : ", out of bounds"));
  }
  return cta().shared + address;
}

// ---- global memory ----

// [first, end) of what kernels may read by asynchronous copies; empty: anything.
inline std::vector<std::pair<const unsigned char*, const unsigned char*>> readable;

inline void check_readable(const void* pointer, size_t bytes) {
  const auto* first = static_cast<const unsigned char*>(pointer);
  bool inside = readable.empty();
  for (const auto& [begin, end] : readable) inside = inside || (begin <= first && first + bytes <= end);
  if (!inside) fail("reads global memory out of bounds");
}

// ---- the scheduler ----

inline std::function<void()> thread_body;

inline void thread_main() {
  try {
    thread_body();
  } catch (const std::exception& error) {
    if (cta().error.empty()) cta().error = error.what();
  }
  thread().done = true;
  _longjmp(cta().scheduler, 1);
}

[[gnu::noinline]] inline void switch_to(Thread* next) {
  running_thread = next;
  if (_setjmp(cta().scheduler) == 0) {
    if (next->started) _longjmp(next->resume, 1);
    next->started = true;
    setcontext(&next->start);
  }
  running_thread = nullptr;
}

inline std::string what_they_wait_for(const std::vector<std::unique_ptr<Thread>>& threads, int count) {
  std::map<std::string, int> waits;
  for (int t = 0; t < count; ++t) {
    ++waits[threads[t]->done ? "(returned)" : threads[t]->waits_for ? threads[t]->waits_for : "(ready)"];
  }
  std::string text = "no thread can go on:";
  for (const auto& [what, n] : waits) text += " " + std::to_string(n) + " at " + what + ";";
  return text;
}

inline void run_posted() {
  std::swap(cta().posted[random_bits() % cta().posted.size()], cta().posted.back());
  const std::function<void()> work = std::move(cta().posted.back());
  cta().posted.pop_back();
  cta().progress();
  work();
}

inline void run_cta(const std::vector<std::unique_ptr<Thread>>& threads) {
  Cta& here = cta();
  int left = here.threads;
  while (left > 0) {
    const bool stuck = here.ready.empty() || here.idle_polls > 1000 + 100 * here.threads;
    if (!here.posted.empty() && (stuck || seed == 0 || random_bits() % 16 == 0)) {
      run_posted();
      continue;
    }
    if (stuck) fail(what_they_wait_for(threads, here.threads));
    const size_t pick = seed ? random_bits() % here.ready.size() : 0;
    Thread* next = here.ready[pick];
    if (seed) {
      here.ready[pick] = here.ready.back();
      here.ready.pop_back();
    } else {
      here.ready.erase(here.ready.begin());
    }
    switch_to(next);
    if (!here.error.empty()) throw std::runtime_error(here.error);
    left -= next->done;
  }
}

[[gnu::noinline]] inline void prepare(Thread& it, int rank, dim3 block) {
  it.rank = rank;
  it.index = dim3(rank % block.x, rank / block.x % block.y, rank / (block.x * block.y));
  it.started = it.done = false;
  it.waits_for = nullptr;
  getcontext(&it.start);
  it.start.uc_stack.ss_sp = it.stack.get();
  it.start.uc_stack.ss_size = kStack;
  it.start.uc_link = nullptr;
  makecontext(&it.start, thread_main, 0);
}

// Runs body() once per thread of the grid. Throws what a thread threw.
inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  static std::vector<std::unique_ptr<Thread>> threads;
  const int count = static_cast<int>(block.x * block.y * block.z);
  while (static_cast<int>(threads.size()) < count) threads.push_back(std::make_unique<Thread>());
  std::vector<unsigned char> memory(shared_bytes + kSharedAlignment + kCanary);
  const size_t past = reinterpret_cast<uintptr_t>(memory.data()) % kSharedAlignment;
  unsigned char* const shared = memory.data() + (past ? kSharedAlignment - past : 0);
  thread_body = body;
  random_state = seed;
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  for (unsigned i = 0; i < order.size(); ++i) {
    const size_t at = seed ? random_bits() % (i + 1) : i;
    order[i] = order[at];
    order[at] = i;
  }
  for (const unsigned flat : order) {
    Cta here;
    here.grid = grid;
    here.block = block;
    here.index = dim3(flat % grid.x, flat / grid.x % grid.y, flat / (grid.x * grid.y));
    here.threads = count;
    here.shared = shared;
    here.shared_bytes = shared_bytes;
    here.warps.assign((count + kWarp - 1) / kWarp, Group{kWarp});
    here.warpgroups.assign((count + 127) / 128, Group{128});
    std::memset(shared, kPoison, shared_bytes + kCanary);
    running_cta = &here;
    for (int t = 0; t < count; ++t) {
      prepare(*threads[t], t, block);
      here.ready.push_back(threads[t].get());
    }
    running_thread = nullptr;
    run_cta(threads);
    for (size_t i = 0; i < kCanary; ++i) {
      if (shared[shared_bytes + i] != kPoison) fail("wrote past the end of shared memory");
    }
  }
}

}  // namespace emulator

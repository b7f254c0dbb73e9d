// The scheduler of the emulator (see emulator.h). Its fibers run in fibers.cpp, its blocks in launch.cpp.
//
// A worker is an OS thread with its fibers and up to `max_resident` blocks in progress. There is no scheduling loop:
// a fiber that must wait picks the next one and changes to it directly. Only a finished block or an error comes back to
// the worker's own stack. A finished thread goes on as a thread that has not started yet, on the same stack, so a
// kernel without barriers needs one stack and no change at all.
//
// Nothing here depends on time or on the operating system's scheduling, except the order in which the OS threads
// reach atomics: blocks are dealt to workers in turn.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "emulator.h"
#include "schedule.h"
#include "stacks.h"

namespace specbranch::emulator {

#ifdef SPECBRANCH_EMULATOR_ASAN
constexpr size_t guard_bytes = 0;  // the sanitizer guards the shared memory
#else
constexpr size_t guard_bytes = 256;
#endif
constexpr int max_resident = 3;
constexpr int max_warps = max_block_threads / lanes_per_warp;

struct Fiber {
  void* stack_pointer;  // where it waits
  Stack* stack;         // null: not started
};

// Bit i is lane i. A lane that exists is running or in exactly one of the other sets.
struct Warp {
  uint32_t exists, ready, exited, at_barrier, in_collective;
  Request* requests[lanes_per_warp];
};

struct Block {
  bool active = false;
  uint64_t serial = 0;
  uint3 index;
  void* shared = nullptr;
  uint32_t guard_word = 0;
  uint32_t ready_warps = 0;
  int alive = 0, at_barrier = 0;
  Site barrier_site{""};
  Warp warps[max_warps];
  Fiber fibers[max_block_threads];
};

struct Grid {
  const char* name;
  dim3 size, block;
  size_t shared_bytes;
  void (*thread)(void*);
  void* argument;
  Schedule schedule;
  uint64_t blocks;
  int block_threads;
  uint64_t first_block, block_step;  // shuffled: block number i to start is first_block + i * block_step
};

inline bool same_place(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

inline bool same_collective(const Request& a, const Request& b) {
  return a.mask == b.mask && a.complete == b.complete && same_place(a.site, b.site);
}

// For messages.
std::string text_of(uint3 v);
std::string text_of(Site site);
std::string hexadecimal(unsigned value);

class Worker {
 public:
  // Runs blocks number `first`, `first + step`, … of the grid; returns what went wrong, or "".
  std::string run(const Grid& grid, uint64_t first, uint64_t step, const bool& others_failed);

  int lane() const { return thread_ & (lanes_per_warp - 1); }
  uint64_t thread_serial() const { return block_->serial * max_block_threads + thread_; }
  void barrier(Site site);
  void collective(Request& request);
  void yield();
  [[noreturn]] void fail(std::string what, Site site);

 private:
  static void fiber_main();

  void run_blocks(uint64_t first, uint64_t step, const bool& others_failed);
  void start_block(Block& block, uint64_t number);
  bool finish_block(Block& block);
  void abandon_blocks();

  void pick();
  void wait();
  void jump(void** saved, Stack* own, bool final);
  void enter();
  void set_ready(Warp& warp, uint32_t lanes);

  uint3 thread_index(int thread) const;
  std::string thread_text(int thread) const { return "thread " + text_of(thread_index(thread)); }
  void set_error(const std::string& what);
  void explain_divergence(Site site);
  void explain_deadlock();
  std::string explain_wait(int thread) const;
  [[noreturn]] void leave();

  const Grid* grid_ = nullptr;
  Random random_;
  StackPool stacks_;
  std::vector<std::unique_ptr<unsigned char[]>> shared_;
  Block blocks_[max_resident];
  int resident_ = 1;

  // The running fiber; after pick() the one to run next.
  Block* block_ = nullptr;
  int thread_ = 0;
  int block_run_ = 0, warp_run_ = 0;  // picks left until shuffling changes the block, the warp

  void* main_stack_pointer_ = nullptr;
  const void* main_bottom_ = nullptr;  // for the address sanitizer
  size_t main_size_ = 0;
  std::string error_;
};

// Of this OS thread; null outside of a kernel.
extern __thread Worker* worker SPECBRANCH_EMULATOR_TLS;

// The same, for what kernels call as `what`; throws where there is none.
Worker& current(const char* what);

}  // namespace specbranch::emulator

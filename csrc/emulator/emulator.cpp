// The scheduler of the emulator (emulator.h says what it is for).
//
// A worker is an OS thread with its fibers and up to `max_resident` blocks in progress. There is no scheduling loop:
// a fiber that must wait picks the next one and changes to it directly. Only a finished block or an error comes back to
// the worker's own stack. A finished thread goes on as a thread that has not started yet, on the same stack, so a
// kernel without barriers needs one stack and no change at all.
//
// Nothing here depends on time or on the operating system's scheduling, except the order in which the OS threads
// reach atomics: blocks are dealt to workers in turn.
#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "cuda.h"
#include "switch.h"

#if defined(__SANITIZE_ADDRESS__)
#define SPECBRANCH_EMULATOR_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SPECBRANCH_EMULATOR_ASAN
#endif
#endif
#ifdef SPECBRANCH_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

__thread uint3 threadIdx SPECBRANCH_EMULATOR_TLS;
__thread uint3 blockIdx SPECBRANCH_EMULATOR_TLS;
__thread dim3 blockDim SPECBRANCH_EMULATOR_TLS;
__thread dim3 gridDim SPECBRANCH_EMULATOR_TLS;

namespace specbranch::emulator {

__thread void* block_shared_memory SPECBRANCH_EMULATOR_TLS;
__thread int atomics_until_yield SPECBRANCH_EMULATOR_TLS;

namespace {

#ifdef SPECBRANCH_EMULATOR_ASAN
constexpr size_t stack_bytes = 256 * 1024;
constexpr size_t guard_bytes = 0;  // the sanitizer guards the shared memory
#else
constexpr size_t stack_bytes = 64 * 1024;
constexpr size_t guard_bytes = 256;
#endif
constexpr int max_resident = 3;
constexpr int max_warps = max_block_threads / lanes_per_warp;

// Larger grids are worth a second OS thread.
constexpr uint64_t small_grid_threads = 4096;

// ---- Schedules.

enum class Order { forward, reverse, shuffle };

struct Schedule {
  Order order = Order::shuffle;
  uint64_t seed = 0;
};

Schedule parse_schedule(const std::string& text) {
  if (text.empty()) return {};
  if (text == "forward") return {Order::forward, 0};
  if (text == "reverse") return {Order::reverse, 0};
  const std::string prefix = "shuffle:";
  const std::string digits = text.compare(0, prefix.size(), prefix) == 0 ? text.substr(prefix.size()) : "";
  if (digits.empty() || digits.size() > 18 || digits.find_first_not_of("0123456789") != std::string::npos) {
    throw std::invalid_argument("emulator schedule: expected forward, reverse or shuffle:SEED, got " + text);
  }
  return {Order::shuffle, std::stoull(digits)};
}

int parse_threads(const std::string& text) {
  if (text.empty()) return 2;
  if (text.size() > 3 || text.find_first_not_of("0123456789") != std::string::npos || std::stoi(text) < 1) {
    throw std::invalid_argument("SPECBRANCH_EMULATOR_THREADS: expected 1 to 999, got " + text);
  }
  return std::stoi(text);
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

struct Settings {
  std::mutex mutex;
  std::string schedule;
  int threads = 0;
};

Settings& settings() {
  static Settings settings;
  return settings;
}

class Random {
 public:
  Random() = default;
  explicit Random(uint64_t seed) : state_(seed) {
    for (int i = 0; i < 4; ++i) next();
  }
  uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>(static_cast<uint64_t>(next()) * n >> 32); }
  // 1 to 2^(bits - 1), each order of magnitude as often as the others.
  int run_length(int bits) { return 1 << below(bits); }
  // The number of a set bit.
  int pick(uint32_t bits) {
    const uint32_t word = next();
    const int rotation = word >> 27;
    const uint32_t rotated = bits >> rotation | bits << (-rotation & 31);
    const int bit = (word & 0x04000000u) != 0 ? __builtin_ctz(rotated) : 31 - __builtin_clz(rotated);
    return (bit + rotation) & 31;
  }

 private:
  uint64_t state_ = 0;
};

uint64_t hash_text(const char* text) {
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (; *text != '\0'; ++text) hash = (hash ^ static_cast<unsigned char>(*text)) * 1099511628211u;
  return hash;
}

// ---- Stacks.

struct Stack {
  char* bottom;
  char* top;
};

// Stacks of fibers, each above a page that must not be touched. They are kept for the next launch.
class StackPool {
 public:
  Stack* take() {
    if (free_.empty()) grow();
    Stack* stack = free_.back();
    free_.pop_back();
#ifdef SPECBRANCH_EMULATOR_ASAN
    __asan_unpoison_memory_region(stack->bottom, stack_bytes);  // of frames that were left for good
#endif
    return stack;
  }
  void give_back(Stack* stack) { free_.push_back(stack); }

 private:
  static constexpr int chunk = 32;

  void grow() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t stride = stack_bytes + page;
    void* memory = mmap(nullptr, chunk * stride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    free_.reserve(free_.size() + chunk);
    for (int i = chunk - 1; i >= 0; --i) {
      char* start = static_cast<char*>(memory) + i * stride;
      mprotect(start, page, PROT_NONE);
      // Tops at different places in a page: threads do the same things at the same depth, and their stacks would
      // otherwise compete for the same cache sets.
      const size_t colour = static_cast<size_t>(i) * 7 % 64 * 64;
      stacks_.push_back(std::make_unique<Stack>(Stack{start + page, start + stride - colour}));
      free_.push_back(stacks_.back().get());
    }
  }

  std::vector<std::unique_ptr<Stack>> stacks_;
  std::vector<Stack*> free_;
};

// ---- Blocks in progress.

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

std::string text_of(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string text_of(Site site) { return site.line == 0 ? site.file : site.file + (":" + std::to_string(site.line)); }

std::string hexadecimal(unsigned value) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", value);
  return text;
}

bool same_place(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

bool same_collective(const Request& a, const Request& b) {
  return a.mask == b.mask && a.complete == b.complete && same_place(a.site, b.site);
}

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

__thread Worker* worker SPECBRANCH_EMULATOR_TLS;

// ---- Picking the next thread.

void Worker::set_ready(Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  block_->ready_warps |= 1u << (&warp - block_->warps);
}

// Sets block_ and thread_ to a thread that can run, and takes it out of the ready set. There is one: a block whose
// threads all wait has been reported.
void Worker::pick() {
  int w, l;
  if (grid_->schedule.order == Order::shuffle) {
    if (--block_run_ < 0 || block_->ready_warps == 0) {
      Block* candidates[max_resident];
      int n = 0;
      for (int i = 0; i < resident_; ++i) {
        if (blocks_[i].active && blocks_[i].ready_warps != 0) candidates[n++] = &blocks_[i];
      }
      block_ = candidates[random_.below(n)];
      block_run_ = random_.run_length(13);
      warp_run_ = 0;
    }
    w = thread_ / lanes_per_warp;
    if (--warp_run_ < 0 || !(block_->ready_warps >> w & 1u)) {
      w = random_.pick(block_->ready_warps);
      warp_run_ = random_.run_length(9);
    }
    l = random_.pick(block_->warps[w].ready);
  } else if (grid_->schedule.order == Order::forward) {
    w = __builtin_ctz(block_->ready_warps);
    l = __builtin_ctz(block_->warps[w].ready);
  } else {
    w = 31 - __builtin_clz(block_->ready_warps);
    l = 31 - __builtin_clz(block_->warps[w].ready);
  }
  Warp& warp = block_->warps[w];
  warp.ready &= ~(1u << l);
  if (warp.ready == 0) block_->ready_warps &= ~(1u << w);
  thread_ = w * lanes_per_warp + l;
}

uint3 Worker::thread_index(int thread) const {
  const dim3& block = grid_->block;
  const unsigned t = static_cast<unsigned>(thread);
  return {t % block.x, t / block.x % block.y, t / (block.x * block.y)};
}

// Makes the variables of CUDA those of the running fiber.
void Worker::enter() {
  blockIdx = block_->index;
  block_shared_memory = block_->shared;
}

// ---- Changing fibers.

// Goes to the fiber that pick() chose, or, when block_ is null, to the worker's own stack. `own` is given back.
void Worker::jump(void** saved, Stack* own, bool final) {
  void* target;
  Stack* stack = nullptr;
  if (block_ == nullptr) {
    target = main_stack_pointer_;
    if (own != nullptr) stacks_.give_back(own);
  } else {
    Fiber& fiber = block_->fibers[thread_];
    if (fiber.stack == nullptr) {
      fiber.stack = stacks_.take();
      fiber.stack_pointer = prepare_stack(fiber.stack->bottom, fiber.stack->top, &Worker::fiber_main);
    }
    if (own != nullptr) stacks_.give_back(own);
    target = fiber.stack_pointer;
    stack = fiber.stack;
  }
#ifdef SPECBRANCH_EMULATOR_ASAN
  void* fake_stack = nullptr;
  const void* bottom = stack != nullptr ? stack->bottom : main_bottom_;
  const size_t size = stack != nullptr ? static_cast<size_t>(stack->top - stack->bottom) : main_size_;
  __sanitizer_start_switch_fiber(final ? nullptr : &fake_stack, bottom, size);
  switch_stack(saved, target);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  (void)stack;
  (void)final;
  switch_stack(saved, target);
#endif
}

// The running fiber cannot go on, or lets others go first: it is in one of its warp's sets.
void Worker::wait() {
  Block* const my_block = block_;
  const int my_thread = thread_;
  if (my_block->ready_warps == 0) {
    explain_deadlock();
    leave();
  }
  pick();
  if (block_ == my_block && thread_ == my_thread) return;
  const uint3 my_index = threadIdx;
  jump(&my_block->fibers[my_thread].stack_pointer, nullptr, false);
  // Whoever came here picked this fiber, so block_ and thread_ are its own again.
  threadIdx = my_index;
  enter();
}

void Worker::fiber_main() {
  Worker* const self = worker;
#ifdef SPECBRANCH_EMULATOR_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (self->main_size_ == 0) {  // the first fiber of a run comes from the worker's own stack
    self->main_bottom_ = bottom;
    self->main_size_ = size;
  }
#endif
  for (;;) {
    threadIdx = self->thread_index(self->thread_);
    self->enter();
    bool thrown = true;
    try {
      self->grid_->thread(self->grid_->argument);
      thrown = false;
    } catch (const std::exception& error) {
      self->set_error(std::string("exception: ") + error.what());
    } catch (...) {
      self->set_error("exception of an unknown type");
    }
    if (thrown) self->leave();
    Block* const block = self->block_;
    Fiber& fiber = block->fibers[self->thread_];
    Stack* const stack = fiber.stack;
    fiber.stack = nullptr;
    block->warps[self->thread_ / lanes_per_warp].exited |= 1u << self->lane();
    void* unused;
    if (--block->alive == 0) {
      self->block_ = nullptr;
      self->jump(&unused, stack, true);
    }
    if (block->ready_warps == 0) {
      self->explain_deadlock();
      self->leave();
    }
    self->pick();
    Fiber& next = self->block_->fibers[self->thread_];
    if (next.stack == nullptr) {
      next.stack = stack;
    } else {
      self->jump(&unused, stack, true);
    }
  }
}

void Worker::leave() {
  block_ = nullptr;
  void* unused;
  jump(&unused, nullptr, true);
  std::abort();  // nobody comes back
}

// ---- What kernels call.

void Worker::barrier(Site site) {
  Block& block = *block_;
  if (block.at_barrier == 0) {
    block.barrier_site = site;
  } else if (!same_place(site, block.barrier_site)) {
    explain_divergence(site);
    leave();
  }
  block.warps[thread_ / lanes_per_warp].at_barrier |= 1u << lane();
  if (++block.at_barrier == grid_->block_threads) {
    block.at_barrier = 0;
    for (int w = 0; w * lanes_per_warp < grid_->block_threads; ++w) {
      block.warps[w].at_barrier = 0;
      set_ready(block.warps[w], block.warps[w].exists);
    }
  }
  wait();
}

void Worker::collective(Request& request) {
  Warp& warp = block_->warps[thread_ / lanes_per_warp];
  const uint32_t me = 1u << lane();
  if (!(request.mask & me)) {
    fail(std::string(request.what) + ": the calling lane is not in its mask", request.site);
  }
  warp.requests[lane()] = &request;
  warp.in_collective |= me;
  if ((warp.in_collective & request.mask) == request.mask) {
    bool all_here = true;
    for (uint32_t rest = request.mask; rest != 0; rest &= rest - 1) {
      all_here &= same_collective(request, *warp.requests[__builtin_ctz(rest)]);
    }
    if (all_here) {
      request.complete(warp.requests, request.mask);
      warp.in_collective &= ~request.mask;
      set_ready(warp, request.mask);
    }
  }
  wait();
}

void Worker::yield() {
  if (grid_->schedule.order != Order::shuffle) {
    atomics_until_yield = INT_MAX;
    return;
  }
  atomics_until_yield = static_cast<int>(random_.below(32));
  set_ready(block_->warps[thread_ / lanes_per_warp], 1u << lane());
  block_run_ = 0;  // another block may go on for long: it must not need what this block has not written yet
  wait();
}

// ---- Errors. A message is made before the stack is left for good, in functions that return.

__attribute__((noinline)) void Worker::set_error(const std::string& what) {
  error_ = std::string(grid_->name) + ": block " + text_of(block_->index) + ", " + thread_text(thread_) + ": " + what;
}

void Worker::fail(std::string what, Site site) {
  set_error(what + " at " + text_of(site));
  std::string().swap(what);  // nobody destroys it
  leave();
}

__attribute__((noinline)) void Worker::explain_divergence(Site site) {
  int other = 0;
  while (!(block_->warps[other / lanes_per_warp].at_barrier >> (other % lanes_per_warp) & 1u)) ++other;
  set_error("divergent __syncthreads at " + text_of(site) + ": " + thread_text(other) + " waits at " +
            text_of(block_->barrier_site));
}

// Why the thread cannot go on, or "" when it does not wait for a missing lane.
std::string Worker::explain_wait(int thread) const {
  const Warp& warp = block_->warps[thread / lanes_per_warp];
  const int first = thread / lanes_per_warp * lanes_per_warp;
  if (!(warp.in_collective >> (thread - first) & 1u)) return "";
  const Request& request = *warp.requests[thread - first];
  const std::string what =
      std::string(request.what) + " with mask " + hexadecimal(request.mask) + " at " + text_of(request.site);
  for (uint32_t rest = request.mask; rest != 0; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    const std::string waits = what + " waits for lane " + std::to_string(l) + ", ";
    if (!(warp.exists >> l & 1u)) return waits + "which the block does not have";
    if (warp.exited >> l & 1u) return waits + "which has exited";
    if (warp.at_barrier >> l & 1u) return waits + "which waits in __syncthreads at " + text_of(block_->barrier_site);
    const Request& other = *warp.requests[l];
    if (!same_collective(request, other)) {
      return waits + "which waits in " + other.what + " with mask " + hexadecimal(other.mask) + " at " +
             text_of(other.site);
    }
  }
  return "";
}

__attribute__((noinline)) void Worker::explain_deadlock() {
  for (int i = 0; i < grid_->block_threads; ++i) {
    const std::string why = explain_wait(i);
    if (why.empty()) continue;
    thread_ = i;
    return set_error(why);
  }
  // Only __syncthreads is left, and threads that it waits for and that are gone.
  int waiting = -1, exited = -1;
  for (int i = 0; i < grid_->block_threads; ++i) {
    const Warp& warp = block_->warps[i / lanes_per_warp];
    if (waiting < 0 && (warp.at_barrier >> (i % lanes_per_warp) & 1u)) waiting = i;
    if (exited < 0 && (warp.exited >> (i % lanes_per_warp) & 1u)) exited = i;
  }
  thread_ = waiting;
  set_error("__syncthreads at " + text_of(block_->barrier_site) + " waits for " + thread_text(exited) +
            ", which has exited");
}

// ---- Blocks.

void Worker::start_block(Block& block, uint64_t number) {
  const Grid& grid = *grid_;
  uint64_t linear = number;
  if (grid.schedule.order == Order::reverse) {
    linear = grid.blocks - 1 - number;
  } else if (grid.schedule.order == Order::shuffle) {
    __extension__ using Wide = unsigned __int128;
    linear = static_cast<uint64_t>((static_cast<Wide>(number) * grid.block_step + grid.first_block) % grid.blocks);
  }
  block.index = {static_cast<unsigned>(linear % grid.size.x), static_cast<unsigned>(linear / grid.size.x % grid.size.y),
                 static_cast<unsigned>(linear / grid.size.x / grid.size.y)};
  static uint64_t blocks_started = 1;
  block.serial = __atomic_fetch_add(&blocks_started, 1, __ATOMIC_RELAXED);
  block.alive = grid.block_threads;
  block.at_barrier = 0;
  block.ready_warps = 0;
  for (int w = 0; w * lanes_per_warp < grid.block_threads; ++w) {
    const int lanes = std::min(lanes_per_warp, grid.block_threads - w * lanes_per_warp);
    const uint32_t all = lanes == lanes_per_warp ? ~0u : (1u << lanes) - 1u;
    Warp& warp = block.warps[w];
    warp.exists = warp.ready = all;
    warp.exited = warp.at_barrier = warp.in_collective = 0;
    block.ready_warps |= 1u << w;
  }
  for (int i = 0; i < grid.block_threads; ++i) block.fibers[i].stack = nullptr;
  // NaN as float, and in either half as float16 and bfloat16; a large number as an integer.
  block.guard_word = linear % 2 == 0 ? 0xFFA5FFA5u : 0x7FB37FB3u;
  unsigned char* bytes = static_cast<unsigned char*>(block.shared);
  const size_t size = grid.shared_bytes + guard_bytes;
  for (size_t i = 0; i < size; i += sizeof(uint32_t)) {
    std::memcpy(bytes + i, &block.guard_word, std::min(sizeof(uint32_t), size - i));
  }
  block.active = true;
}

// False, with error_ set, when the block wrote past its shared memory.
bool Worker::finish_block(Block& block) {
  block.active = false;
  const unsigned char* bytes = static_cast<const unsigned char*>(block.shared);
  unsigned char word[sizeof(uint32_t)];
  std::memcpy(word, &block.guard_word, sizeof word);
  for (size_t i = grid_->shared_bytes; i < grid_->shared_bytes + guard_bytes; ++i) {
    if (bytes[i] == word[i % sizeof word]) continue;
    error_ = std::string(grid_->name) + ": block " + text_of(block.index) + ": written past the " +
             std::to_string(grid_->shared_bytes) + " bytes of shared memory, at byte " + std::to_string(i);
    return false;
  }
  return true;
}

void Worker::abandon_blocks() {
  for (Block& block : blocks_) {
    if (!block.active) continue;
    block.active = false;
    for (int i = 0; i < grid_->block_threads; ++i) {
      if (block.fibers[i].stack != nullptr) stacks_.give_back(block.fibers[i].stack);
    }
  }
}

std::string Worker::run(const Grid& grid, uint64_t first, uint64_t step, const bool& others_failed) {
  grid_ = &grid;
  random_ = Random(grid.schedule.seed * 0x9E3779B97F4A7C15u + hash_text(grid.name) + grid.blocks + first);
  resident_ = grid.schedule.order == Order::shuffle ? max_resident : 1;
  blockDim = grid.block;
  gridDim = grid.size;
  atomics_until_yield = 0;
  block_run_ = warp_run_ = 0;
  main_size_ = 0;
  error_.clear();
  worker = this;
  try {
    run_blocks(first, step, others_failed);
  } catch (const std::exception& error) {  // out of memory for stacks
    error_ = std::string(grid.name) + ": " + error.what();
  }
  worker = nullptr;
  abandon_blocks();
  shared_.clear();
  return error_;
}

void Worker::run_blocks(uint64_t first, uint64_t step, const bool& others_failed) {
  for (int i = 0; i < resident_; ++i) {
    shared_.push_back(std::unique_ptr<unsigned char[]>(new unsigned char[grid_->shared_bytes + guard_bytes]));
    blocks_[i].shared = shared_.back().get();
  }
  uint64_t next = first;
  while (!__atomic_load_n(&others_failed, __ATOMIC_RELAXED)) {
    block_ = nullptr;
    for (int i = 0; i < resident_; ++i) {
      Block& block = blocks_[i];
      if (!block.active && next < grid_->blocks) {
        start_block(block, next);
        next += step;
      }
      if (block.active) block_ = &block;
    }
    if (block_ == nullptr) return;
    thread_ = 0;
    pick();
    jump(&main_stack_pointer_, nullptr, false);
    if (!error_.empty()) return;
    for (int i = 0; i < resident_; ++i) {
      if (blocks_[i].active && blocks_[i].alive == 0 && !finish_block(blocks_[i])) return;
    }
  }
}

// Workers are kept for the next launch: making the stacks costs more than a small grid.
class WorkerPool {
 public:
  std::unique_ptr<Worker> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return std::make_unique<Worker>();
    std::unique_ptr<Worker> worker = std::move(free_.back());
    free_.pop_back();
    return worker;
  }
  void give_back(std::unique_ptr<Worker> worker) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(worker));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> free_;
};

WorkerPool& worker_pool() {
  static WorkerPool* pool = new WorkerPool;  // never destroyed: a detached thread may still be running at exit
  return *pool;
}

Worker& current(const char* what) {
  if (worker == nullptr) throw std::runtime_error(std::string(what) + " outside of a kernel");
  return *worker;
}

void check_launch(const Grid& grid) {
  const auto refuse = [&grid](const std::string& why) {
    throw std::runtime_error(std::string(grid.name) + ": " + why);
  };
  const dim3 &g = grid.size, &b = grid.block;
  const bool possible = g.x >= 1 && g.y >= 1 && g.z >= 1 && g.x <= 0x7FFFFFFFu && g.y <= 65535 && g.z <= 65535 &&
                        b.x >= 1 && b.y >= 1 && b.z >= 1 && b.x <= 1024 && b.y <= 1024 && b.z <= 64 &&
                        b.x * b.y * b.z <= static_cast<unsigned>(max_block_threads);
  if (!possible) refuse("cannot launch a grid of " + text_of(g) + " blocks of " + text_of(b) + " threads");
  if (grid.shared_bytes > max_shared_bytes) {
    refuse("cannot launch with " + std::to_string(grid.shared_bytes) + " bytes of shared memory, at most " +
           std::to_string(max_shared_bytes));
  }
  if (worker != nullptr) refuse("launched from a kernel");
}

}  // namespace

// ---- The interface.

void set_schedule(const std::string& schedule) {
  parse_schedule(schedule);
  const std::lock_guard<std::mutex> lock(settings().mutex);
  settings().schedule = schedule;
}

std::string schedule() {
  std::string text;
  {
    const std::lock_guard<std::mutex> lock(settings().mutex);
    text = settings().schedule;
  }
  if (text.empty()) text = environment("SPECBRANCH_EMULATOR_SCHEDULE");
  return text.empty() ? "shuffle:0" : text;
}

void set_threads(int threads) {
  if (threads < 0) throw std::invalid_argument("set_threads: expected 0 or more, got " + std::to_string(threads));
  const std::lock_guard<std::mutex> lock(settings().mutex);
  settings().threads = threads;
}

int lane() { return current("lane").lane(); }

uint64_t thread_serial() { return current("thread_serial").thread_serial(); }

void block_barrier(Site site) { current("__syncthreads").barrier(site); }

void warp_collective(Request& request) { current(request.what).collective(request); }

void report(std::string what, Site site) { current("report").fail(std::move(what), site); }

void yield_now() {
  if (worker != nullptr) worker->yield();
}

void run_grid(const char* name, dim3 grid_size, dim3 block, size_t shared_bytes, void (*thread)(void*),
              void* argument) {
  Grid grid{name, grid_size, block, shared_bytes, thread, argument, parse_schedule(schedule()), 0, 0, 0, 1};
  check_launch(grid);
  grid.blocks = static_cast<uint64_t>(grid_size.x) * grid_size.y * grid_size.z;
  grid.block_threads = static_cast<int>(block.x * block.y * block.z);
  Random random(grid.schedule.seed * 0xD1342543DE82EF95u + hash_text(name) + grid.blocks);
  const auto random_block = [&] { return (static_cast<uint64_t>(random.next()) << 32 | random.next()) % grid.blocks; };
  grid.first_block = random_block();
  do {
    grid.block_step = random_block();
  } while (std::gcd(grid.block_step, grid.blocks) != 1);

  int threads;
  {
    const std::lock_guard<std::mutex> lock(settings().mutex);
    threads = settings().threads;
  }
  if (threads == 0) threads = parse_threads(environment("SPECBRANCH_EMULATOR_THREADS"));
  if (grid.blocks * grid.block_threads < small_grid_threads) threads = 1;
  threads = static_cast<int>(std::min<uint64_t>(threads, grid.blocks));

  std::vector<std::string> errors(threads);
  bool failed = false;
  const auto work = [&](int i) {
    try {
      std::unique_ptr<Worker> mine = worker_pool().take();
      errors[i] = mine->run(grid, i, threads, failed);
      worker_pool().give_back(std::move(mine));
    } catch (const std::exception& error) {
      errors[i] = std::string(name) + ": " + error.what();
    }
    if (!errors[i].empty()) __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
  };
  std::vector<std::thread> helpers;
  helpers.reserve(threads);
  int started = 1;
  try {
    for (; started < threads; ++started) helpers.emplace_back(work, started);
  } catch (const std::system_error&) {  // no more OS threads: this one does the rest
  }
  work(0);
  for (; started < threads; ++started) work(started);
  for (std::thread& helper : helpers) helper.join();
  for (const std::string& error : errors) {
    if (!error.empty()) throw std::runtime_error(error);
  }
}

// ---- Warp collectives.

void warp_exchange(unsigned mask, const void* mine, size_t bytes, void* all, Site site) {
  struct Part : Request {
    const unsigned char* mine;
    unsigned char* all;
    size_t bytes;
    Part(unsigned mask, Site site, Complete complete, const void* mine, void* all, size_t bytes)
        : Request("warp_exchange", mask, site, complete),
          mine(static_cast<const unsigned char*>(mine)),
          all(static_cast<unsigned char*>(all)),
          bytes(bytes) {}
  };
  Part part(mask, site,
            [](Request* const* requests, unsigned lanes) {
              for (int to = 0; to < lanes_per_warp; ++to) {
                if (!(lanes >> to & 1u)) continue;
                const Part& receiver = *static_cast<Part*>(requests[to]);
                for (int from = 0; from < lanes_per_warp; ++from) {
                  unsigned char* place = receiver.all + from * receiver.bytes;
                  if (lanes >> from & 1u) {
                    std::memcpy(place, static_cast<Part*>(requests[from])->mine, receiver.bytes);
                  } else {
                    std::memset(place, 0, receiver.bytes);
                  }
                }
              }
            },
            mine, all, bytes);
  warp_collective(part);
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, unsigned operand, int width, Site site) {
  static const char* const names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  const char* const name = names[static_cast<int>(kind)];
  if (width < 1 || width > lanes_per_warp || (width & (width - 1)) != 0) {
    report(std::string(name) + ": width " + std::to_string(width) + " is not a power of two up to 32", site);
  }
  const int me = current(name).lane(), first = me & ~(width - 1);
  int source = me;
  switch (kind) {
    case Shuffle::index: source = first + static_cast<int>(operand & static_cast<unsigned>(width - 1)); break;
    case Shuffle::up:
      if (operand <= static_cast<unsigned>(me - first)) source = me - static_cast<int>(operand);
      break;
    case Shuffle::down:
      if (operand < static_cast<unsigned>(first + width - me)) source = me + static_cast<int>(operand);
      break;
    case Shuffle::exclusive_or: {
      const unsigned other = static_cast<unsigned>(me) ^ operand;
      if (other < static_cast<unsigned>(first + width)) source = static_cast<int>(other);
      break;
    }
  }
  if ((mask >> me & 1u) && !(mask >> source & 1u)) {
    report(std::string(name) + ": source lane " + std::to_string(source) + " is not in mask " + hexadecimal(mask),
           site);
  }
  struct Part : Request {
    uint64_t bits, result;
    int source;
    Part(const char* what, unsigned mask, Site site, Complete complete, uint64_t bits, int source)
        : Request(what, mask, site, complete), bits(bits), result(0), source(source) {}
  };
  Part part(name, mask, site,
            [](Request* const* requests, unsigned lanes) {
              for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
                Part& receiver = *static_cast<Part*>(requests[__builtin_ctz(rest)]);
                receiver.result = static_cast<Part*>(requests[receiver.source])->bits;
              }
            },
            bits, source);
  warp_collective(part);
  return part.result;
}

void sync_warp(unsigned mask, Site site) {
  Request request("__syncwarp", mask, site, [](Request* const*, unsigned) {});
  warp_collective(request);
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
  struct Part : Request {
    unsigned result;
    Part(unsigned mask, Site site, Complete complete, bool predicate)
        : Request("a vote", mask, site, complete), result(predicate) {}
  };
  Part part(mask, site,
            [](Request* const* requests, unsigned lanes) {
              unsigned votes = 0;
              for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
                const int l = __builtin_ctz(rest);
                votes |= static_cast<Part*>(requests[l])->result << l;
              }
              for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
                static_cast<Part*>(requests[__builtin_ctz(rest)])->result = votes;
              }
            },
            predicate);
  warp_collective(part);
  return part.result;
}

}  // namespace specbranch::emulator

// From a launch to its blocks, and what a worker does for each of them.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "worker.h"

namespace specbranch::emulator {

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

// ---- Launches.

namespace {

// Larger grids are worth a second OS thread.
constexpr uint64_t small_grid_threads = 4096;

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

std::atomic<uint64_t> launch_count{0};

}  // namespace

uint64_t launches() { return launch_count; }

void run_grid(const char* name, dim3 grid_size, dim3 block, size_t shared_bytes, void (*thread)(void*),
              void* argument) {
  Grid grid{name, grid_size, block, shared_bytes, thread, argument, parse_schedule(schedule()), 0, 0, 0, 1};
  check_launch(grid);
  ++launch_count;
  grid.blocks = static_cast<uint64_t>(grid_size.x) * grid_size.y * grid_size.z;
  grid.block_threads = static_cast<int>(block.x * block.y * block.z);
  Random random(grid.schedule.seed * 0xD1342543DE82EF95u + hash_text(name) + grid.blocks);
  const auto random_block = [&] { return (static_cast<uint64_t>(random.next()) << 32 | random.next()) % grid.blocks; };
  grid.first_block = random_block();
  do {
    grid.block_step = random_block();
  } while (std::gcd(grid.block_step, grid.blocks) != 1);

  int threads = thread_count();
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
  } catch (const std::system_error&) {  // NOLINT(bugprone-empty-catch)
    // There are no more OS threads: this one does the rest.
  }
  work(0);
  for (; started < threads; ++started) work(started);
  for (std::thread& helper : helpers) helper.join();
  for (const std::string& error : errors) {
    if (!error.empty()) throw std::runtime_error(error);
  }
}

}  // namespace specbranch::emulator

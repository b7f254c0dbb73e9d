// What a fiber does: it runs a thread, waits, and chooses who goes on.
#include <climits>
#include <exception>
#include <stdexcept>

#include "switch.h"
#include "worker.h"

#ifdef SPECBRANCH_EMULATOR_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

__thread uint3 threadIdx SPECBRANCH_EMULATOR_TLS;
__thread uint3 blockIdx SPECBRANCH_EMULATOR_TLS;
__thread dim3 blockDim SPECBRANCH_EMULATOR_TLS;
__thread dim3 gridDim SPECBRANCH_EMULATOR_TLS;

namespace specbranch::emulator {

__thread void* block_shared_memory SPECBRANCH_EMULATOR_TLS;
__thread int atomics_until_yield SPECBRANCH_EMULATOR_TLS;

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
  (void) final;
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

// ---- The same as functions.

Worker& current(const char* what) {
  if (worker == nullptr) throw std::runtime_error(std::string(what) + " outside of a kernel");
  return *worker;
}

int lane() { return current("lane").lane(); }

uint64_t thread_serial() { return current("thread_serial").thread_serial(); }

void block_barrier(Site site) { current("__syncthreads").barrier(site); }

void warp_collective(Request& request) { current(request.what).collective(request); }

void report(std::string what, Site site) { current("report").fail(std::move(what), site); }

void yield_now() {
  if (worker != nullptr) worker->yield();
}

}  // namespace specbranch::emulator

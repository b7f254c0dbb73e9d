// Runs CUDA kernels, compiled as C++, on the CPU: for tests, on machines without a GPU.
//
// Each CUDA thread is a fiber with a stack of its own. The fibers of one block share one OS thread and change over at
// barriers, warp collectives and (when shuffled) atomics, in an order that the schedule decides: a kernel that lacks a
// barrier gives other results under another schedule. Blocks run on a few OS threads, so atomics are real ones.
//
// What CUDA leaves undefined is an error here, thrown by launch() with kernel, block, thread and source line: threads
// of a block at different __syncthreads, a barrier or collective that waits for an exited thread, lanes of one mask at
// different collectives, a caller outside its own mask, a shuffle from a lane outside the mask, writing just past the
// shared memory. Shared memory starts as NaN, differently in each block. Built with -fsanitize=address, every access
// outside the shared memory is reported by the sanitizer. Not seen: weak memory order, bank conflicts, resource limits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "types.h"

// Variables of the running CUDA thread: thread-local storage without a guard, at a fixed offset. The model is named
// for executables too: the linker would turn initial-exec into local-exec there, and so replace an addition whose flags
// the undefined-behaviour sanitizer tests.
#if !defined(__GLIBC__) || (defined(__PIC__) && !defined(__PIE__) && defined(__SANITIZE_ADDRESS__))
#define SPECBRANCH_EMULATOR_TLS __attribute__((visibility("hidden")))
#elif defined(__PIC__) && !defined(__PIE__)
#define SPECBRANCH_EMULATOR_TLS __attribute__((visibility("hidden"), tls_model("initial-exec")))
#else
#define SPECBRANCH_EMULATOR_TLS __attribute__((visibility("hidden"), tls_model("local-exec")))
#endif
extern __thread uint3 threadIdx SPECBRANCH_EMULATOR_TLS;
extern __thread uint3 blockIdx SPECBRANCH_EMULATOR_TLS;
extern __thread dim3 blockDim SPECBRANCH_EMULATOR_TLS;
extern __thread dim3 gridDim SPECBRANCH_EMULATOR_TLS;

// The place of a call, as the default value of a parameter of type Site.
#define SPECBRANCH_EMULATOR_HERE ::specbranch::emulator::Site(__builtin_FILE(), __builtin_LINE())

namespace specbranch::emulator {

constexpr int lanes_per_warp = 32;
constexpr int max_block_threads = 1024;
constexpr size_t max_shared_bytes = 227 * 1024;

// The schedule of the launches to come:
//   forward      the lowest thread that can run always runs, blocks from the first to the last
//   reverse      the highest, and from the last to the first
//   shuffle:N    random from seed N: short and long runs of one thread, warp or block, several blocks interleaved
//   "" (default) what the environment variable SPECBRANCH_EMULATOR_SCHEDULE says; without it shuffle:0
// With one number of OS threads, the same schedule runs the same way again. Throws std::invalid_argument.
void set_schedule(const std::string& schedule);
std::string schedule();

// OS threads of a launch, 0 (default): what SPECBRANCH_EMULATOR_THREADS says, without it 2. Small grids use one.
void set_threads(int threads);

// How many launches this process has made.
uint64_t launches();

// A place in the source, for messages.
struct Site {
  const char* file;
  int line;
  constexpr Site(const char* file, int line = 0) : file(file), line(line) {}
};

// ---- For kernels (csrc/emulator/cuda.h and the host bodies of csrc/core/cuda/ptx.h).

extern __thread void* block_shared_memory SPECBRANCH_EMULATOR_TLS;
inline void* shared_memory() { return block_shared_memory; }

// Lane of the calling thread in its warp.
int lane();

// A number that no other CUDA thread of the process has, also not one of an earlier launch: the key of what a host body
// keeps for a thread.
uint64_t thread_serial();

// __syncthreads.
void block_barrier(Site site);

// A warp collective: a lane's part, kept on the stack of its fiber while it waits. The lane that arrives last runs
// `complete`, which reads and writes the parts of all lanes in the mask; requests[i] is null for the others.
struct Request {
  using Complete = void (*)(Request* const* requests, unsigned mask);
  const char* what;  // for messages
  unsigned mask;
  Site site;
  Complete complete;
  Request(const char* what, unsigned mask, Site site, Complete complete)
      : what(what), mask(mask), site(site), complete(complete) {}
};
void warp_collective(Request& request);

// Ends the launch with an error at `site`.
[[noreturn]] void report(std::string what, Site site);

// A point where, when shuffled, other threads and blocks may go on: called around atomics.
extern __thread int atomics_until_yield SPECBRANCH_EMULATOR_TLS;
void yield_now();
inline void maybe_yield() {
  if (--atomics_until_yield < 0) yield_now();
}

// Every lane in `mask` gives `bytes` bytes and gets those of all lanes: `all` is [32][bytes], zero outside the mask.
void warp_exchange(unsigned mask, const void* mine, size_t bytes, void* all, Site site = SPECBRANCH_EMULATOR_HERE);

// Every lane in `mask` gives an Input and gets an Output; compute(const Input (&)[32], Output (&)[32]) runs once for
// the warp, on the lane that comes last. Inputs of lanes outside the mask are value-initialised.
template <typename Output, typename Input, typename Compute>
Output warp_compute(unsigned mask, const Input& mine, Compute compute, Site site = SPECBRANCH_EMULATOR_HERE) {
  static_assert(std::is_trivially_copyable<Input>::value && std::is_trivially_copyable<Output>::value, "plain data");
  struct Part : Request {
    const Input* input;
    Output output;
    Compute* compute;
    Part(unsigned mask, Site site, Complete complete, const Input* input, Compute* compute)
        : Request("warp_compute", mask, site, complete), input(input), output(), compute(compute) {}
  };
  Part part(
      mask, site,
      [](Request* const* requests, unsigned lanes) {
        Input inputs[lanes_per_warp] = {};
        Output outputs[lanes_per_warp] = {};
        Part* last = nullptr;
        for (int i = 0; i < lanes_per_warp; ++i) {
          if (!(lanes >> i & 1u)) continue;
          last = static_cast<Part*>(requests[i]);
          inputs[i] = *last->input;
        }
        (*last->compute)(inputs, outputs);
        for (int i = 0; i < lanes_per_warp; ++i) {
          if (lanes >> i & 1u) static_cast<Part*>(requests[i])->output = outputs[i];
        }
      },
      &mine, &compute);
  warp_collective(part);
  return part.output;
}

// ---- For hosts.

void run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*thread)(void*), void* argument);

// Runs thread_body() once for each thread of the grid; throws std::runtime_error for what cannot be launched and for
// what the kernel does wrong.
template <typename Body>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Body&& thread_body) {
  using Plain = std::remove_reference_t<Body>;
  run_grid(
      name, grid, block, shared_bytes, [](void* body) { (*static_cast<Plain*>(body))(); },
      const_cast<void*>(static_cast<const void*>(&thread_body)));
}

}  // namespace specbranch::emulator

// Kernels for the tests of the emulator: right ones, and ones with one mistake each. They also compile with nvcc.
#pragma once

#include "core/cuda/device.h"

namespace test_kernels {

using specbranch::cuda::all_lanes;
using specbranch::cuda::shared_memory;
using specbranch::cuda::warp_size;

// ---- Right.

// out[block] = sum of the block's part of x, through shared memory. Without its barriers (barrier = false) wrong under
// some order of threads.
template <bool barrier>
__global__ void block_sum(const unsigned* x, unsigned* out) {
  unsigned* part = shared_memory<unsigned>();
  const int t = static_cast<int>(threadIdx.x), size = static_cast<int>(blockDim.x);
  part[t] = x[static_cast<int64_t>(blockIdx.x) * size + t];
  if (barrier) __syncthreads();
  for (int half = size / 2; half > 0; half /= 2) {
    if (t < half) part[t] += part[t + half];
    if (barrier) __syncthreads();
  }
  if (t == 0) out[blockIdx.x] = part[0];
}

// The same with warp shuffles. Without the barrier between warps wrong under some order of warps.
template <bool barrier>
__global__ void shuffle_sum(const unsigned* x, unsigned* out) {
  unsigned* part = shared_memory<unsigned>();
  const int t = static_cast<int>(threadIdx.x), lane = t % warp_size, warp = t / warp_size;
  unsigned sum = x[static_cast<int64_t>(blockIdx.x) * blockDim.x + t];
  for (int step = warp_size / 2; step > 0; step /= 2) sum += __shfl_down_sync(all_lanes, sum, step);
  if (lane == 0) part[warp] = sum;
  if (barrier) __syncthreads();
  if (warp == 0) {
    const int warps = static_cast<int>(blockDim.x) / warp_size;
    sum = lane < warps ? part[lane] : 0u;
    for (int step = warp_size / 2; step > 0; step /= 2) sum += __shfl_xor_sync(all_lanes, sum, step);
    if (lane == 0) out[blockIdx.x] = sum;
  }
}

// The block that finishes last sums what all blocks wrote. `tickets` is 0 before and after. Wrong when thread 0 draws
// the ticket before the others have written (barrier = false): seen only when blocks are interleaved.
template <bool barrier>
__global__ void last_block_sum(const unsigned* x, unsigned* partial, unsigned* tickets, long long* out) {
  int* is_last = shared_memory<int>();
  const int64_t me = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  partial[me] = x[me];
  __threadfence();
  if (barrier) __syncthreads();
  if (threadIdx.x == 0) *is_last = atomicAdd(tickets, 1u) == gridDim.x - 1;
  __syncthreads();
  if (*is_last && threadIdx.x == 0) {
    __threadfence();
    long long sum = 0;
    for (int64_t i = 0; i < static_cast<int64_t>(gridDim.x) * blockDim.x; ++i) sum += partial[i];
    *out = sum;
    *tickets = 0;
  }
}

// All atomics from all threads on one address each.
struct AtomicResults {
  int add_int, max_int, min_int;
  unsigned add_unsigned, max_unsigned, min_unsigned, or_unsigned, cas_unsigned, exchanges;
  unsigned long long add_long, max_long, min_long;
  float add_float;
  unsigned exchange_slot;
};

__global__ void atomics(AtomicResults* r) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&r->add_int, -i);
  atomicMax(&r->max_int, i);
  atomicMin(&r->min_int, -i);
  atomicAdd(&r->add_unsigned, static_cast<unsigned>(i));
  atomicMax(&r->max_unsigned, static_cast<unsigned>(i));
  atomicMin(&r->min_unsigned, 1000000u - static_cast<unsigned>(i));
  atomicOr(&r->or_unsigned, 1u << (i % 32));
  atomicAdd(&r->add_long, 1ull << 33);
  atomicMax(&r->max_long, (1ull << 40) + static_cast<unsigned long long>(i));
  atomicMin(&r->min_long, (1ull << 40) - static_cast<unsigned long long>(i));
  atomicAdd(&r->add_float, 1.0f);
  unsigned seen = r->cas_unsigned, expected;
  do {
    expected = seen;
    seen = atomicCAS(&r->cas_unsigned, expected, expected + 2);
  } while (seen != expected);
  // A chain of exchanges hands on each value once: the values taken and the one left are all the values put in.
  atomicAdd(&r->exchanges, atomicExch(&r->exchange_slot, static_cast<unsigned>(i) + 1));
}

// What each lane gets from every kind of shuffle and vote, over `width` lanes.
constexpr int warp_results = 9;

__global__ void warp_functions(int width, int* out) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  int* mine = out + threadIdx.x * warp_results;
  mine[0] = __shfl_sync(all_lanes, 100 + lane, lane + 5, width);
  mine[1] = __shfl_up_sync(all_lanes, 100 + lane, 3, width);
  mine[2] = __shfl_down_sync(all_lanes, 100 + lane, 3, width);
  mine[3] = __shfl_xor_sync(all_lanes, 100 + lane, 6, width);
  mine[4] = static_cast<int>(__ballot_sync(all_lanes, lane % 3 == 0));
  mine[5] = __any_sync(all_lanes, lane == 31) + 2 * __any_sync(all_lanes, lane == 32);
  mine[6] = __all_sync(all_lanes, lane < 31) + 2 * __all_sync(all_lanes, lane < 32);
  // Two halves apart, each with its own mask.
  const unsigned half = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  if (lane < 16) {
    mine[7] = __shfl_xor_sync(half, lane, 1);
  } else {
    mine[7] = -__shfl_xor_sync(half, lane, 2);
  }
  __syncwarp();
  mine[8] = static_cast<int>(__shfl_sync(all_lanes, static_cast<double>(lane) / 2, 7) * 2 +
                             static_cast<double>(__shfl_sync(all_lanes, static_cast<int64_t>(lane) << 40, 9) >> 40));
}

// Where each thread is.
__global__ void indices(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  __syncthreads();
  const unsigned block_threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * block_threads + thread] = blockIdx.x + blockIdx.y * 10 + blockIdx.z * 100 + threadIdx.x * 1000 +
                                        threadIdx.y * 100000 + threadIdx.z * 10000000;
}

// Shared memory as a block finds it.
__global__ void initial_shared_memory(int words, unsigned* out) {
  const unsigned* shared = shared_memory<unsigned>();
  for (int i = static_cast<int>(threadIdx.x); i < words; i += static_cast<int>(blockDim.x)) {
    out[static_cast<int64_t>(blockIdx.x) * words + i] = shared[i];
  }
}

// A deep frame in every thread, kept over barriers.
__global__ void deep_stacks(int* out) {
  int frame[2048];
  for (int i = 0; i < 2048; ++i) frame[i] = static_cast<int>(threadIdx.x) + i;
  __syncthreads();
  int sum = 0;
  for (int i = 0; i < 2048; ++i) {
    sum += frame[i];
    if (i % 512 == 0) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// ---- With a mistake.

__global__ void exit_before_barrier(int* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 32) {
    out[threadIdx.x] = 1;
    __syncthreads();
  } else {
    __syncthreads();
    out[threadIdx.x] = 2;
  }
}

__global__ void barrier_against_shuffle(int* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = __shfl_sync(all_lanes, 1, 0);
}

__global__ void shuffle_from_inactive_lane(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000FFFFu, 1, 20);
}

__global__ void shuffle_outside_of_mask(int* out) { out[threadIdx.x] = __shfl_sync(0x0000FFFFu, 1, 0); }

__global__ void shuffle_with_exited_lane(int* out) {
  if (threadIdx.x == 7) return;
  out[threadIdx.x] = __shfl_sync(all_lanes, 1, 0);
}

__global__ void shuffle_at_two_places(int* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_sync(all_lanes, 1, 0);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(all_lanes, 2, 16);
  }
}

__global__ void shuffle_odd_width(int* out) { out[threadIdx.x] = __shfl_sync(all_lanes, 1, 0, 12); }

__global__ void write_past_shared_memory(int words) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) shared[words] = 2;
}

__global__ void read_past_shared_memory(int words, int* out) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = shared[words];
}

__global__ void misaligned_vector(const float* x, float* out) {
  const float4 v = *reinterpret_cast<const float4*>(x);
  out[threadIdx.x] = v.x + v.w;
}

}  // namespace test_kernels

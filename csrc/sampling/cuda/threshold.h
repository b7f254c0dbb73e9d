// A radix select for one block: the largest entries whose weights reach a target, without sorting.
//
// Entries are (key, weight) pairs. Each level puts those inside the current range of keys into 1024 bins, finds the
// bin in which the running sum from the top reaches the target, and makes it the next range: at most four levels for
// 32-bit keys, and one or two for the narrow ranges that a bracket leaves. Sums are integers, so the order of the
// atomic additions does not matter.
#pragma once

#include "sampling/cuda/fixed_point.h"

namespace specbranch::cuda {

constexpr int sampler_threads = 512;
constexpr int sampler_warps = sampler_threads / warp_size;

constexpr int select_bin_bits = 10, select_bins = 1 << select_bin_bits;
static_assert(select_bins == 2 * sampler_threads, "each thread sums two bins");

struct SelectShared {
  uint32_t low[select_bins], high[select_bins];  // halves of the bins' weights: 64-bit additions would spin
  Word64 warp_sums[sampler_warps];
  Word64 above, through;
  int bin;
};

// The largest value any thread of the block gives. `warps`: scratch; the caller puts a barrier before its next use.
__device__ inline Word64 block_max(Word64 value, Word64 (&warps)[sampler_warps]) {
  value = warp_max(value);
  if (lane_index() == 0) warps[warp_index()] = value;
  __syncthreads();
  for (int w = 0; w < sampler_warps; ++w) value = larger(value, warps[w]);
  return value;
}
__device__ inline Word64 block_sum(Word64 value, Word64 (&warps)[sampler_warps]) {
  value = warp_sum(value);
  if (lane_index() == 0) warps[warp_index()] = value;
  __syncthreads();
  value = 0;
  for (int w = 0; w < sampler_warps; ++w) value += warps[w];
  return value;
}

// Finds the lowest `cut` in [lo, hi] such that the weights of larger keys, `above` of them larger than hi, are less
// than `target`; with stop_when_exact any number that separates the same entries. The caller makes sure that above <
// target and lo <= hi. Returns false when the entries from lo up do not reach the target; `above` is then their sum.
//
// Entries: count(), key(i), and weight(i) of an entry whose key is in range. All threads of the block call this.
template <typename Entries>
__device__ bool radix_select(SelectShared& s, const Entries& entries, Word64 lo, Word64 hi, Word64& above,
                             double target, bool stop_when_exact, Word64& cut) {
  const int thread = static_cast<int>(threadIdx.x);
  for (;;) {
    const int width = 64 - __clzll(static_cast<long long>(hi - lo));
    const int shift = width > select_bin_bits ? width - select_bin_bits : 0;
    for (int i = thread; i < select_bins; i += sampler_threads) s.low[i] = s.high[i] = 0;
    if (thread == 0) s.bin = -1;
    __syncthreads();
    const uint32_t count = entries.count();
    for (uint32_t i = threadIdx.x; i < count; i += sampler_threads) {
      const Word64 key = entries.key(i);
      if (key < lo || key > hi) continue;
      const int bin = static_cast<int>((hi - key) >> shift);
      const Word64 weight = entries.weight(i);
      const uint32_t low = static_cast<uint32_t>(weight);
      const uint32_t before = atomicAdd(&s.low[bin], low);
      const uint32_t high = static_cast<uint32_t>(weight >> 32) + (before + low < before ? 1u : 0u);
      if (high != 0) atomicAdd(&s.high[bin], high);
    }
    __syncthreads();

    const int first = 2 * thread;
    const Word64 weight_0 = static_cast<Word64>(s.high[first]) << 32 | s.low[first];
    const Word64 weight_1 = static_cast<Word64>(s.high[first + 1]) << 32 | s.low[first + 1];
    const Word64 inclusive = warp_inclusive_sum(weight_0 + weight_1);
    if (lane_index() == warp_size - 1) s.warp_sums[warp_index()] = inclusive;
    __syncthreads();
    Word64 before = above + inclusive - weight_0 - weight_1, all = above;
    for (int w = 0; w < sampler_warps; ++w) {
      if (w < warp_index()) before += s.warp_sums[w];
      all += s.warp_sums[w];
    }
    const Word64 middle = before + weight_0, after = middle + weight_1;
    if (static_cast<double>(before) < target && static_cast<double>(after) >= target) {  // in one thread at most
      const bool second = static_cast<double>(middle) < target;
      s.bin = first + (second ? 1 : 0);
      s.above = second ? middle : before;
      s.through = second ? after : middle;
    }
    __syncthreads();
    const int bin = s.bin;
    const bool exact = bin >= 0 && stop_when_exact && static_cast<double>(s.through) == target;
    const Word64 found_above = s.above;
    __syncthreads();
    if (bin < 0) {
      above = all;
      return false;
    }
    above = found_above;
    hi -= static_cast<Word64>(bin) << shift;
    const Word64 bin_length = Word64{1} << shift;
    if (hi - lo >= bin_length) lo = hi - (bin_length - 1);
    if (shift == 0 || exact) {
      cut = lo;
      return true;
    }
  }
}

}  // namespace specbranch::cuda

// Noise of single tokens, and weights exp(z - z_max) summed as 40-bit fixed point: the bits of core/numerics.h and of
// sampling/cpu/fixed_point.h.
#pragma once

#include "core/numerics.h"
#include "sampling/cuda/logit_row.h"

namespace specbranch::cuda {

constexpr float two_to_23 = 8388608.0f;

// The words of a block are picked by comparisons: an index would put them into local memory.
__device__ inline uint32_t pick(const uint32_t (&word)[4], int i) {
  const uint32_t low = (i & 1) != 0 ? word[1] : word[0], high = (i & 1) != 0 ? word[3] : word[2];
  return (i & 2) != 0 ? high : low;
}
__device__ inline float pick(const float (&x)[4], int i) {
  const float low = (i & 1) != 0 ? x[1] : x[0], high = (i & 1) != 0 ? x[3] : x[2];
  return (i & 2) != 0 ? high : low;
}

// The one of core/numerics.h would pick a word by its index.
__device__ inline float token_noise(const NoiseKey& key, int32_t token) {
  const auto word = [&](Purpose purpose) {
    return pick(key.block(static_cast<uint32_t>(token / group_tokens), purpose).word, token % group_tokens);
  };
  const uint32_t first = word(Purpose::gumbel);
  const uint32_t tail = first < 65536u ? word(Purpose::gumbel_tail) : 0u;
  return gumbel<float>(static_cast<int32_t>(first), static_cast<int32_t>(tail));
}
constexpr float max_noise = 46.0f;  // words are at least 2^-65, and -log(2^-65) < 45.1

// floor(x * 2^20) in the low bits of 2^23 + floor(x * 2^20), for 0 <= x * 2^20 < 2^23. One instruction; a conversion
// to integer would run at a quarter of the rate or less.
__device__ inline uint32_t floor_times_two_to_20(float x) {
#ifdef SPECBRANCH_EMULATED
  return __float_as_uint(floorf(x * two_to_20) + two_to_23);
#else
  return __float_as_uint(__fmaf_rd(x, two_to_20, two_to_23));
#endif
}

// floor(2^40 * weight) for a weight up to 1, as two 20-bit digits. Every step is exact.
struct FixedPoint {
  uint32_t high, low;

  __device__ explicit FixedPoint(float weight) {
    constexpr uint32_t offset = 0x4B000000u;  // the bits of 2^23
    const uint32_t shifted = floor_times_two_to_20(weight);
    high = shifted - offset;
    low = floor_times_two_to_20(fmaf(weight, two_to_20, two_to_23 - __uint_as_float(shifted))) - offset;
  }
  __device__ Word64 value() const { return (static_cast<Word64>(high) << 20) + low; }
};

// Sums at most 4095 values.
struct MassSum {
  uint32_t high = 0, low = 0;

  __device__ void add(const FixedPoint& q) {
    high += q.high;
    low += q.low;
  }
  __device__ Word64 total() const { return (static_cast<Word64>(high) << 20) + low; }
};

}  // namespace specbranch::cuda

// The first pass over a row: its largest logit, and what makes it unusable.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstring>

#include "core/cpu/simd.h"
#include "sampling/cpu/logit_row.h"
#include "sampling/cpu/row_state.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

template <typename Row>
void segment_max(const Row& row, int64_t begin, int64_t end, SegmentState& out) {
  constexpr int unroll = 4, step = unroll * simd_width;
  FloatVec best[unroll];
  IntVec nan[unroll] = {};
  for (auto& b : best) b = broadcast(-HUGE_VALF);
  int64_t t = begin;
  for (; t + step <= end; t += step) {
    for (int u = 0; u < unroll; ++u) {
      const FloatVec x = row.raw(t + u * simd_width);
      best[u] = max(x, best[u]);
      nan[u] |= (IntVec)(x != x);
    }
  }
  out.max_logit = reduce_max(max(max(best[0], best[1]), max(best[2], best[3])));
  out.nan = any(nan[0] | nan[1] | nan[2] | nan[3]);
  for (; t < end; ++t) {
    const float x = row[t];
    out.max_logit = x > out.max_logit ? x : out.max_logit;
    out.nan |= x != x;
  }
}

// The mask is read for blocks with a token above the largest one so far, or with a NaN. Those are few.
template <typename T>
void segment_max(const LogitRow<T, true>& row, int64_t begin, int64_t end, SegmentState& out) {
  FloatVec best = broadcast(-HUGE_VALF), floor = best;
  IntVec nan{};
  int64_t t = begin;
  for (; t + block_tokens <= end; t += block_tokens) {
    if (row.allowed_in_block(t) == 0) continue;
    FloatVec most[2] = {broadcast(-HUGE_VALF), broadcast(-HUGE_VALF)};
    IntVec odd{};
#pragma GCC unroll 8
    for (int i = 0; i < block_tokens; i += 2 * simd_width) {
      const FloatVec x = row.raw(t + i), y = row.raw(t + i + simd_width);
      most[0] = max(x, most[0]);
      most[1] = max(y, most[1]);
      odd |= unordered(x, y);
    }
    if (__builtin_expect(!any((IntVec)(max(most[0], most[1]) > floor) | odd), 1)) continue;
    for (int i = 0; i < block_tokens; i += simd_width) {
      const FloatVec x = row.vector(t, i);
      best = max(x, best);
      nan |= (IntVec)(x != x);
    }
    floor = broadcast(reduce_max(best));
  }
  out.max_logit = floor[0];
  out.nan = any(nan);
  for (; t < end; ++t) {
    const float x = row[t];
    out.max_logit = x > out.max_logit ? x : out.max_logit;
    out.nan |= x != x;
  }
}

// The mass of exp(z - the segment's largest z), within 4%: enough to guess where top-p cuts. A float's exponent counts
// in powers of two and its fraction goes straight from one to the next, on average 4% above them.
template <typename Row>
void segment_mass(const Row& row, int64_t begin, int64_t end, float inverse_temperature, SegmentState& out) {
  constexpr float bits_of_one = 1065353216.0f;
  out.mass = 0.0f;
  if (!(out.max_logit > -HUGE_VALF)) return;
  const float scale = std::min(inverse_temperature * (8388608.0f * 1.44269504f), FLT_MAX);
  constexpr int unroll = 4;
  FloatVec sum[unroll] = {};
  const auto weight = [&](FloatVec x) {
    const FloatVec bits = max((x - out.max_logit) * scale + bits_of_one, FloatVec{});
    const IntVec whole = __builtin_convertvector(bits, IntVec);
    FloatVec w;
    std::memcpy(&w, &whole, sizeof w);
    return w;
  };
  int64_t t = begin;
  for (; t + block_tokens <= end; t += block_tokens) {
    if (row.allowed_in_block(t) == 0) continue;
#pragma GCC unroll 16
    for (int i = 0; i < block_tokens; i += simd_width) sum[i / simd_width % unroll] += weight(row.vector(t, i));
  }
  const FloatVec all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  for (int i = 0; i < simd_width; ++i) out.mass += all[i];
  for (; t < end; ++t) out.mass += weight(broadcast(row[t]))[0];
  out.mass *= 0.961f;
}

// The first token in [begin, end) whose logit is value; end if there is none.
template <typename Row>
int64_t find_logit(const Row& row, int64_t begin, int64_t end, float value) {
  int64_t t = begin;
  for (; t + simd_width <= end; t += simd_width) {
    const uint32_t bits = row.only_allowed(t, mask_bits((IntVec)(row.raw(t) == value)));
    if (bits) return t + __builtin_ctz(bits);
  }
  while (t < end && row[t] != value) ++t;
  return t;
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

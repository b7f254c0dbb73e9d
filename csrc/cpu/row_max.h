// The first pass over a row: its largest logit, and what makes it unusable.
#pragma once

#include "row_state.h"
#include "simd.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

template <typename T>
void segment_max(const T* row, int64_t begin, int64_t end, SegmentState& out) {
  constexpr int unroll = 4;
  FloatVec best[unroll];
  IntVec nan[unroll] = {};
  for (auto& b : best) b = broadcast(-HUGE_VALF);
  int64_t t = begin;
  for (; t + unroll * simd_width <= end; t += unroll * simd_width) {
    for (int u = 0; u < unroll; ++u) {
      const FloatVec x = load(row + t + u * simd_width);
      best[u] = max(x, best[u]);
      nan[u] |= (IntVec)(x != x);
    }
  }
  out.max_logit = reduce_max(max(max(best[0], best[1]), max(best[2], best[3])));
  out.nan = any(nan[0] | nan[1] | nan[2] | nan[3]);
  for (; t < end; ++t) {
    const float x = to_float(row[t]);
    out.max_logit = x > out.max_logit ? x : out.max_logit;
    out.nan |= x != x;
  }
}

// The first token in [begin, end) whose logit is value; end if there is none.
template <typename T>
int64_t find_logit(const T* row, int64_t begin, int64_t end, float value) {
  int64_t t = begin;
  for (; t + simd_width <= end; t += simd_width) {
    const uint32_t bits = mask_bits((IntVec)(load(row + t) == value));
    if (bits) return t + __builtin_ctz(bits);
  }
  while (t < end && to_float(row[t]) != value) ++t;
  return t;
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

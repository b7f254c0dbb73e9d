// Finding the threshold of top-k or top-p without sorting the row.
//
// Both keep a token iff the total weight of strictly larger tokens is below a target: top-k with weight 1 and target
// k, top-p with weight q = floor(2^40 * exp(z - z_max)) and target top_p * sum(q). A sample of the row brackets the
// threshold; one pass sums the weights above the bracket and lists the tokens inside it; the list is then searched
// exactly. When the sample misled, the row is searched again with a bracket that holds everything.
#pragma once

#include <algorithm>

#include "core/cpu/simd.h"
#include "sampling/cpu/bracket.h"
#include "sampling/cpu/fixed_point.h"
#include "sampling/cpu/logit_row.h"
#include "sampling/cpu/row_state.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

enum class Weight { count, mass };

// Sums the weights of tokens with z >= floor, in all and above the bracket, and lists those inside it.
template <Weight weight, typename Row>
void segment_gather(const Row& row, int64_t begin, int64_t end, float inverse_temperature, float z_max, float floor,
                    Bracket bracket, SegmentState& out, float* list_z, int32_t* list_token) {
  MassSum above, total;
  uint64_t rest_above = 0, rest_total = 0;
  int64_t listed = 0;
  const float low = std::max(bracket.low, floor);
  const bool has_floor = floor > lowest_finite;
  int64_t t = begin;
  // Blocks of 64 tokens, because one hard-to-predict branch for each vector would stall the arithmetic.
  for (; t + block_tokens <= end; t += block_tokens) {
    const uint64_t allowed = row.allowed_in_block(t);
    if (allowed == 0) continue;
    uint64_t inside = 0, over_bits = 0;
#pragma GCC unroll 16
    for (int i = 0; i < block_tokens; i += simd_width) {
      const FloatVec z = (weight == Weight::mass ? row.vector(t, i) : row.raw(t + i)) * inverse_temperature;
      const IntVec over = (IntVec)(z > bracket.high);
      inside |= static_cast<uint64_t>(mask_bits((IntVec)(z >= low) & (IntVec)(z <= bracket.high))) << i;
      if (weight == Weight::mass) {
        const FixedPointVec q(exp_nonpositive(z - z_max));
        above.add(q, over);
        if (has_floor) {
          total.add(q, (IntVec)(z >= floor));
        } else {
          total.add(q);  // masked tokens weigh nothing anyway
        }
      } else {
        over_bits |= static_cast<uint64_t>(mask_bits(over)) << i;
      }
    }
    rest_above += static_cast<uint64_t>(__builtin_popcountll(over_bits & allowed));
    for (inside &= allowed; inside != 0; inside &= inside - 1) {
      const int64_t token = t + __builtin_ctzll(inside);
      list_z[listed] = row[token] * inverse_temperature;
      list_token[listed++] = static_cast<int32_t>(token);
    }
  }
  for (; t < end; ++t) {
    const float z = row[t] * inverse_temperature;
    const uint64_t q = weight == Weight::mass ? fixed_point(exp_nonpositive(z - z_max)) : 1;
    if (z > bracket.high) rest_above += q;
    if (z >= floor) rest_total += q;
    if (z >= low && !(z > bracket.high)) {
      list_z[listed] = z;
      list_token[listed++] = static_cast<int32_t>(t);
    }
  }
  out.weight_above = above.total() + rest_above;
  out.weight_total = total.total() + rest_total;
  out.listed = listed;
}

// The smallest z on the list whose strictly larger tokens weigh less than `target`, `above` of it outside the list.
// Sets complete when the list ended before the target was reached. scratch: room for `count` floats.
template <Weight weight>
float search_list(const float* z, int64_t count, float z_max, uint64_t above, double target, float* scratch,
                  bool& complete) {
  constexpr int bins = 1024;
  complete = false;
  if (count == 0) {
    complete = true;
    return HUGE_VALF;
  }
  const auto token_weight = [z_max](float value) {
    return weight == Weight::mass ? fixed_point(exp_nonpositive(value - z_max)) : uint64_t{1};
  };
  float top = z[0], bottom = z[0];
  for (int64_t i = 1; i < count; ++i) {
    top = std::max(top, z[i]);
    bottom = std::min(bottom, z[i]);
  }
  const float range = std::min(top - bottom, 40.0f);  // far outliers share the last bin
  // Values so close that bins / range could be infinite share the first one: 0 times infinity is no bin.
  const float scale = range > 1e-30f ? bins / range : 0.0f;
  const auto bin_of = [=](float value) {
    return static_cast<int>(std::min((top - value) * scale, static_cast<float>(bins - 1)));
  };

  uint64_t sums[bins] = {};
  int64_t i = 0;
  if (weight == Weight::mass) {
    for (; i + simd_width <= count; i += simd_width) {
      const FloatVec v = load(z + i), scaled = exp_nonpositive(v - z_max) * two_to_40;
      const IntVec bin = __builtin_convertvector(min((top - v) * scale, broadcast(bins - 1.0f)), IntVec);
      for (int lane = 0; lane < simd_width; ++lane) {
        sums[bin[lane]] += static_cast<uint64_t>(static_cast<int64_t>(scaled[lane]));
      }
    }
  }
  for (; i < count; ++i) sums[bin_of(z[i])] += token_weight(z[i]);

  int boundary = 0;
  while (boundary < bins && static_cast<double>(above + sums[boundary]) < target) above += sums[boundary++];
  if (boundary == bins) {
    complete = true;
    return bottom;
  }
  int64_t inside = 0;
  for (int64_t j = 0; j < count; ++j) {
    if (bin_of(z[j]) == boundary) scratch[inside++] = z[j];
  }
  std::sort(scratch, scratch + inside, [](float a, float b) { return a > b; });
  float threshold = scratch[0];
  for (int64_t j = 0; j < inside && static_cast<double>(above) < target;) {
    threshold = scratch[j];
    const uint64_t q = token_weight(threshold);
    for (; j < inside && scratch[j] == threshold; ++j) above += q;
  }
  return threshold;
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

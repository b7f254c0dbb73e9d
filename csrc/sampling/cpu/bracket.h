// Where the threshold of top-k or top-p should lie, guessed from a sample of the row. A wrong guess costs time only
// (threshold.h).
#pragma once

#include <algorithm>
#include <cmath>

#include "core/cpu/simd.h"
#include "sampling/filters.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

struct Bracket {
  float low, high;  // every token above high is kept, none below low
};

constexpr Bracket whole_row{lowest_finite, HUGE_VALF};
constexpr int64_t short_list = 8192;  // listing everything kept is cheaper than another pass up to about here

// A histogram of z_max - z over one in `step` tokens.
struct SampledHistogram {
  static constexpr int bins = 1024, step = 16;
  const float bins_per_unit;
  uint32_t count[bins + 1] = {};  // the last one: masked

  template <typename Row>
  SampledHistogram(const Row& row, int64_t vocabulary, float inverse_temperature, float z_max, float bins_per_unit)
      : bins_per_unit(bins_per_unit) {
    for (int64_t t = 0; t + simd_width <= vocabulary; t += step * simd_width) {
      const FloatVec z = row.vector(t) * inverse_temperature;
      // Overflows may give NaN, which min puts into the last bin.
      const FloatVec bin = min((z_max - z) * bins_per_unit, broadcast(bins - 1.0f));
      const IntVec index = select((IntVec)(z >= lowest_finite), __builtin_convertvector(bin, IntVec), broadcast(bins));
      for (int i = 0; i < simd_width; ++i) ++count[index[i]];
    }
  }
};

// A guess: z in [low, high] should hold the threshold, with few tokens inside.
inline Bracket bracket_count(const SampledHistogram& h, float z_max, double k) {
  const double expected = k / SampledHistogram::step, slack = 4.0 * std::sqrt(expected) + 4.0;
  Bracket bracket = whole_row;
  double above = 0.0;
  bool high_found = false;
  for (int i = 0; i < SampledHistogram::bins - 1; ++i) {
    above += h.count[i];
    const float edge = 1.0f / h.bins_per_unit;
    if (!high_found && above > expected - slack) {
      bracket.high = z_max - i * edge;
      high_found = true;
    }
    if (above >= expected + slack) {
      bracket.low = z_max - (i + 1) * edge;
      if (above * SampledHistogram::step <= short_list) bracket.high = HUGE_VALF;
      break;
    }
  }
  return bracket;
}

// Bins for each unit of z: the last one begins where the tokens further down weigh exp(-6) of what top-p drops, or
// less. So they are fine for flat rows and coarse for peaked ones.
inline float mass_bins(int64_t vocabulary, float mass, double top_p) {
  const double dropped = (1.0 - top_p) * mass;
  return static_cast<float>((SampledHistogram::bins - 1) / (std::log(static_cast<double>(vocabulary) / dropped) + 6.0));
}

// mass: of the row, within 4%; the sample says how much of it lies below a place, which is many small weights. (A mass
// from the sample would be a guess: a few large tokens decide it.) Tokens below the floor are no longer in the row.
inline Bracket bracket_mass(const SampledHistogram& h, float z_max, float floor, double mass, double top_p) {
  constexpr int last = SampledHistogram::bins - 1;
  const float width = 1.0f / h.bins_per_unit;
  double each[last + 1], below_floor = 0.0, samples = 0.0;
  double weight = std::exp(-0.5 * width) * SampledHistogram::step;
  const double ratio = std::exp(-width);
  for (int i = 0; i <= last; ++i, weight *= ratio) {
    each[i] = weight;
    samples += h.count[i];
    if (z_max - (i + 1) * width < floor) below_floor += weight * h.count[i];
  }
  const double dropped = (1.0 - top_p) * mass + top_p * std::min(below_floor, mass), mass_error = 0.04 * dropped;
  // From the bottom up: the dropped tokens are the smallest ones.
  Bracket bracket = whole_row;
  double below = 0.0, variance = 0.0, listed = samples;
  for (int i = last; i >= 0; --i) {
    const double tail = each[i] * h.count[i];
    below += tail;
    variance += tail * each[i];
    samples -= h.count[i];
    // Counts scatter like Poisson variables; and of the tokens in a bin, a few dozen can escape the sample.
    const double error = 3.5 * std::sqrt(variance) + mass_error;
    if (below * (1.0 + 0.5 * width) + error + 4.0 * each[i] <= dropped) {
      bracket.low = z_max - i * width;
      listed = samples;
    }
    if (below * (1.0 - 0.5 * width) - error >= dropped) {
      bracket.high = z_max - i * width;
      break;
    }
  }
  if (listed * SampledHistogram::step <= short_list) bracket.high = HUGE_VALF;
  return bracket;
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

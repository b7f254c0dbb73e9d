// Where the threshold of top-k or top-p should lie, guessed from a sample of the row: every token from the bracket's
// top up will be kept, none below its low end, and few are inside. All blocks of a row draw the same sample and get the
// same bracket. A wrong guess costs time only (row_sampler.h).
//
// For top-p the first launch knows the mass of the row, almost exactly; the sample has to say only how much of it lies
// below a distance from the largest token, which is many small weights. (The mass from a sample would be a guess: a few
// large tokens decide it.) Tokens at a distance d or more weigh V exp(-d) at most, so the histogram ends where that is
// nothing compared to what top-p drops: its bins are fine for flat rows and coarse for peaked ones.
#pragma once

#include "sampling/cuda/threshold.h"

namespace specbranch::cuda {

struct Bracket {
  float low, top;
};

constexpr int sample_groups = 1024;  // evenly spread over the row
constexpr int thread_sample_groups = sample_groups / sampler_threads;
constexpr int32_t min_sampled_vocabulary = 4096;  // shorter rows are listed whole
constexpr int bracket_bins = select_bins;

// What is known before the row is.
struct BracketPlan {
  float tokens_per_sample;
  float short_list;       // so many tokens are listed rather than bracketed from above
  float expected, slack;  // top-k: samples above the threshold, give or take
  float least_range;      // top-k: of the histogram
  float dropped;          // top-p: share of the mass below the threshold
  float vocabulary;

  BracketPlan() = default;
  // max_segments: of row_max.h.
  SPECBRANCH_HD BracketPlan(int64_t vocabulary, int64_t max_segments, int64_t short_list, double top_k, double top_p,
                            float inverse_temperature)
      : tokens_per_sample(static_cast<float>(vocabulary) / (sample_groups * group_tokens)),
        short_list(static_cast<float>(short_list)),
        expected(static_cast<float>(top_k) / tokens_per_sample),
        slack(5.0f * sqrtf(expected * (1.0f - static_cast<float>(top_k) / static_cast<float>(vocabulary))) + 4.0f),
        least_range((max_segments < 8 ? 32.0f : 2.0f) * inverse_temperature),
        dropped(static_cast<float>(1.0 - top_p)),
        vocabulary(static_cast<float>(vocabulary)) {}

  // Bins for each unit of z. `spread`: how far apart the largest logits of the row's segments are, which says how far
  // the row's tail is.
  __device__ float count_bins(float spread) const {
    return (bracket_bins - 1) / fminf(fmaxf(8.0f * spread + least_range, 1e-30f), FLT_MAX);
  }
  // mass: of the row. The last bin then begins where exp(-6) of what top-p drops is left.
  __device__ float mass_bins(float mass) const {
    return (bracket_bins - 1) / (logf(vocabulary / (dropped * mass)) + 6.0f);
  }
};

struct BracketShared {
  uint32_t count[bracket_bins];  // the sample's z_max - z; the last bin has everything further down
  float warp_tail[sampler_warps], warp_square[sampler_warps];
  uint32_t warp_count[sampler_warps];
  int top_bin;
  unsigned low_bin;  // times 2^16, plus how many samples lie above that end
};

// The calling thread's part of the sample. (Loaded before z_max is known.)
struct ThreadSample {
  Group groups[thread_sample_groups];

  template <typename Row>
  __device__ void load(const Row& row) {
    const int32_t all = row.groups();
#pragma unroll
    for (int i = 0; i < thread_sample_groups; ++i) {
      const int64_t at = static_cast<int64_t>(i * sampler_threads + static_cast<int>(threadIdx.x)) * all;
      groups[i] = row.group(static_cast<int32_t>(at / sample_groups));
    }
  }
};

__device__ inline void clear(BracketShared& s) {
  for (int i = static_cast<int>(threadIdx.x); i < bracket_bins; i += sampler_threads) s.count[i] = 0;
  if (threadIdx.x == 0) {
    s.top_bin = -1;
    s.low_bin = ~0u;
  }
}

// A barrier must lie between clear() and this, and one follows it.
__device__ inline void count_sample(BracketShared& s, const ThreadSample& sample, float inverse_temperature,
                                    float z_max, float bins_per_unit) {
#pragma unroll
  for (const Group& group : sample.groups) {
#pragma unroll
    for (const float x : group.x) {
      const float z = x * inverse_temperature;
      if (!(z >= lowest_finite)) continue;
      // Overflows may give NaN, which fminf puts into the last bin.
      atomicAdd(&s.count[static_cast<int>(fminf((z_max - z) * bins_per_unit, bracket_bins - 1.0f))], 1u);
    }
  }
}

// The bracket of top-k; `open`: without an upper end.
__device__ inline Bracket bracket_count(BracketShared& s, float z_max, const BracketPlan& plan, float bins_per_unit,
                                        bool open) {
  const int first = 2 * static_cast<int>(threadIdx.x);
  const uint32_t count_0 = s.count[first], count_1 = s.count[first + 1];
  const uint32_t inclusive = warp_inclusive_sum(count_0 + count_1);
  if (lane_index() == warp_size - 1) s.warp_count[warp_index()] = inclusive;
  __syncthreads();
  uint32_t before = inclusive - count_0 - count_1;
  for (int w = 0; w < warp_index(); ++w) before += s.warp_count[w];
  const auto visit = [&](int bin, uint32_t above, uint32_t through) {
    if (bin == bracket_bins - 1) return;
    if (!(above > plan.expected - plan.slack) && through > plan.expected - plan.slack) s.top_bin = bin;
    if (above < plan.expected + plan.slack && through >= plan.expected + plan.slack) {
      s.low_bin = static_cast<unsigned>(bin) << 16 | min(through, 0xFFFFu);
    }
  };
  visit(first, before, before + count_0);
  visit(first + 1, before + count_0, before + count_0 + count_1);
  __syncthreads();
  Bracket bracket{lowest_finite, infinity};
  if (s.low_bin != ~0u) bracket.low = z_max - static_cast<float>((s.low_bin >> 16) + 1) / bins_per_unit;
  const float listed = static_cast<float>(s.low_bin & 0xFFFFu) * plan.tokens_per_sample;
  const bool few = s.low_bin != ~0u && listed <= plan.short_list;
  if (!open && !few && s.top_bin > 0) bracket.top = z_max - static_cast<float>(s.top_bin) / bins_per_unit;
  return bracket;
}

// The bracket of top-p.
__device__ inline Bracket bracket_mass(BracketShared& s, float z_max, const BracketPlan& plan, float mass,
                                       float bins_per_unit) {
  // From the bottom up: the dropped tokens are the smallest ones.
  constexpr int last = bracket_bins - 1;
  const int bin_0 = last - 2 * static_cast<int>(threadIdx.x), bin_1 = bin_0 - 1;
  const uint32_t count_0 = s.count[bin_0], count_1 = s.count[bin_1];
  // The mass that a sample in the bin stands for.
  const float width = 1.0f / bins_per_unit;
  const float each_0 = plan.tokens_per_sample * expf((static_cast<float>(bin_0) + 0.5f) * -width);
  const float each_1 = plan.tokens_per_sample * expf((static_cast<float>(bin_1) + 0.5f) * -width);
  const float tail_0 = static_cast<float>(count_0) * each_0, tail_1 = static_cast<float>(count_1) * each_1;
  const float tail = warp_inclusive_sum(tail_0 + tail_1);
  const float square = warp_inclusive_sum(tail_0 * each_0 + tail_1 * each_1);
  const uint32_t count = warp_inclusive_sum(count_0 + count_1);
  if (lane_index() == warp_size - 1) {
    s.warp_tail[warp_index()] = tail;
    s.warp_square[warp_index()] = square;
    s.warp_count[warp_index()] = count;
  }
  __syncthreads();
  float below_0 = tail - tail_1, variance_0 = square - tail_1 * each_1;
  uint32_t samples_0 = count - count_1, all = 0;
  for (int w = 0; w < sampler_warps; ++w) {
    if (w < warp_index()) {
      below_0 += s.warp_tail[w];
      variance_0 += s.warp_square[w];
      samples_0 += s.warp_count[w];
    }
    all += s.warp_count[w];
  }
  const float below_1 = below_0 + tail_1, variance_1 = variance_0 + tail_1 * each_1;
  const uint32_t samples_1 = samples_0 + count_1;
  // Counts in bins scatter like Poisson variables; and of the tokens in a bin, a hundred or so can escape the sample.
  const auto error = [](float variance) { return 3.5f * variance * rsqrtf(fmaxf(variance, 1e-30f)); };
  const float error_0 = error(variance_0), error_1 = error(variance_1);
  const float dropped = plan.dropped * mass;

  // The top is the highest bin below which surely too much would be dropped.
  const auto too_much = [&](float below, float error) { return below * (1.0f - 0.5f * width) - error >= dropped; };
  const int top_bin = too_much(below_0, error_0) ? bin_0 : too_much(below_1, error_1) ? bin_1 : -1;
  const unsigned tops = __ballot_sync(all_lanes, top_bin >= 0);
  if (top_bin >= 0 && rank_in(tops) == 0) atomicMax(&s.top_bin, top_bin);  // bins fall with the lane
  __syncthreads();
  // The low end is the lowest bin from there down below which surely not too much is dropped; the last one if none.
  const auto low_end = [&](int bin, float below, float error, float each, uint32_t samples) {
    const bool fits = bin == last || below * (1.0f + 0.5f * width) + error + 4.0f * each <= dropped;
    return fits && bin >= s.top_bin ? static_cast<unsigned>(bin) << 16 | (all - samples) : ~0u;
  };
  const unsigned low_0 = low_end(bin_0, below_0, error_0, each_0, samples_0);
  const unsigned low_1 = low_end(bin_1, below_1, error_1, each_1, samples_1);
  const unsigned low = low_1 < low_0 ? low_1 : low_0;
  const unsigned lows = __ballot_sync(all_lanes, low != ~0u);
  if (low != ~0u && __popc(lows) - rank_in(lows) == 1) atomicMin(&s.low_bin, low);
  __syncthreads();
  Bracket bracket{z_max - static_cast<float>(s.low_bin >> 16) * width, infinity};
  const float listed = static_cast<float>(s.low_bin & 0xFFFFu) * plan.tokens_per_sample;
  if (listed > plan.short_list && s.top_bin >= 0) bracket.top = z_max - static_cast<float>(s.top_bin) * width;
  return bracket;
}

}  // namespace specbranch::cuda

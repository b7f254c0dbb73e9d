// Part of row_sampler.h: steps 1 and 2, before a block goes over its segment.
#pragma once

namespace specbranch::cuda {

// By the first warp: the row's largest logit, and a floor that some k kept tokens reach.
template <typename Row, typename Best, bool statistics>
__device__ void RowSampler<Row, Best, statistics>::find_start() {
  const Word64* maxima = a_.maxima + row_index_ * a_.max_segments;
  const int lane = lane_index();
  const Word64 first = lane < a_.max_segments ? maxima[lane] : 0;
  const Word64 second = lane + warp_size < a_.max_segments ? maxima[lane + warp_size] : 0;
  Word64 mine = larger(first, second);
  const Word64 max_key = warp_max(mine);
  z_max_ = key_score(max_key) * f_.inverse_temperature;
  // With a threshold still to be found, only the largest token is known to be kept.
  if (searches()) mine = lane == 0 ? max_key : 0;
  Word64 floor = 0;
  if (mine != 0 && usable(max_key, f_.inverse_temperature)) {
    floor = candidate(key_token(mine), key_score(mine) * f_.inverse_temperature);
  }
  if (k_ == 1) {
    floor = warp_max(floor);
  } else {
    // Bitonic sort, largest first.
#pragma unroll
    for (int size = 2; size <= warp_size; size *= 2) {
#pragma unroll
      for (int stride = size / 2; stride > 0; stride /= 2) {
        const Word64 other = __shfl_xor_sync(all_lanes, floor, stride);
        const bool takes_larger = ((lane & stride) == 0) == ((lane & size) == 0);
        floor = (other > floor) == takes_larger ? other : floor;
      }
    }
    floor = k_ <= warp_size ? __shfl_sync(all_lanes, floor, (k_ - 1) % warp_size) : 0;
  }
  float mass = 0.0f, bins_per_unit = 0.0f;
  if (f_.search_count) {
    const auto finite = [](Word64 key) { return key != 0 && key_score(key) >= lowest_finite ? key : ~Word64{0}; };
    const Word64 min_key = ~warp_max(larger(~finite(first), ~finite(second)));
    bins_per_unit = f_.bracket_plan.count_bins(z_max_ - key_score(min_key) * f_.inverse_temperature);
  } else if (f_.search_mass) {
    const float* masses = a_.masses + row_index_ * a_.max_segments;
    const auto part = [&](int i, Word64 key) {
      return key == 0 ? 0.0f : masses[i] * exp2_approximate((key_score(key) - key_score(max_key)) * f_.mass_scale);
    };
    mass = warp_sum(part(lane, first) + part(lane + warp_size, second));
    bins_per_unit = f_.bracket_plan.mass_bins(mass);
  }
  if (lane == 0) {
    s_.mass = mass;
    s_.bins_per_unit = bins_per_unit;
    s_.max_key = max_key;
    s_.floor = floor;
    best_.start(floor);
  }
}

template <typename Row, typename Best, bool statistics>
__device__ Bracket RowSampler<Row, Best, statistics>::guess_bracket(const ThreadSample& sample) {
  const float bins_per_unit = s_.bins_per_unit;
  count_sample(s_.bracket, sample, f_.inverse_temperature, z_max_, bins_per_unit);
  __syncthreads();
  // With both filters on the list has to hold all that top-k keeps.
  Bracket bracket = f_.search_count
                        ? bracket_count(s_.bracket, z_max_, f_.bracket_plan, bins_per_unit, /*open=*/f_.search_mass)
                        : bracket_mass(s_.bracket, z_max_, f_.bracket_plan, s_.mass, bins_per_unit);
  bracket.low = fminf(fmaxf(bracket.low, lowest_finite), bracket.top);
  return bracket;
}

}  // namespace specbranch::cuda

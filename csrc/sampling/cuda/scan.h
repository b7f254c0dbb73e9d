// Part of row_sampler.h: step 3, once over a segment or a row.
#pragma once

namespace specbranch::cuda {

// Goes over the groups of a reader, `next` before them. first_token: of the thread's first group.
template <typename Row, typename Best, bool statistics>
__device__ void RowSampler<Row, Best, statistics>::scan(Reader reader, Group next, uint32_t first_token, int32_t steps,
                                                        const Bracket& bracket) {
  constexpr int dense_lanes = 4;                  // from more on, noise is drawn for all lanes at once
  constexpr int max_steps = 4095 / group_tokens;  // of a MassSum
  const int lane = lane_index(), warp = warp_index();
  const bool weighs = statistics || f_.search_mass;
  const bool counts = f_.search_count && bracket.top < infinity;
  // The upper 23 bits of a random word over 2^32, plus 1.
  const auto unit = [](uint32_t word) { return __uint_as_float(word >> 9 | 0x3F800000u); };
  // What a token must reach to be among the best; with noise less, for every rounding (see sampling/cpu/scan.h).
  const auto current_reach = [&] {
    const float floor = best_.floor_score();
    return f_.greedy ? floor : floor - (2e-3f + 1e-6f * fabsf(floor));
  };

  MassSum masses[sum_count];
  uint32_t above = 0, token = first_token;
  int pending = 0, until_flush = max_steps;
  for (;;) {
    const bool last = --steps == 0;
    float z[group_tokens];
#pragma unroll
    for (int j = 0; j < group_tokens; ++j) z[j] = next.x[j] * f_.inverse_temperature;
    next = reader.next();

    if (weighs) {
      float distance = 0.0f;
#pragma unroll
      for (int j = 0; j < group_tokens; ++j) {
        const float weight = exp_nonpositive(z[j] - z_max_);
        const FixedPoint q(weight);
        if (!statistics || f_.search_mass) {
          masses[sum_all].add(q);
          if (z[j] >= bracket.top) masses[sum_above].add(q);
        }
        if (statistics && z[j] >= bracket.top && min_p_keeps(weight)) {
          masses[sum_kept].add(q);
          if (searches()) {
            masses[sum_distance].add(FixedPoint(times_distance(weight, z[j])));
          } else {
            distance += times_distance(weight, z[j]);
          }
        }
      }
      // Without a search a group's tokens are all looked at here, however the row is cut: one conversion is enough.
      if (statistics && !searches()) masses[sum_distance].add(FixedPoint(distance));
    }
    if (counts) {
#pragma unroll
      for (int j = 0; j < group_tokens; ++j) above += z[j] >= bracket.top ? 1u : 0u;
    }
    if (--until_flush == 0 || last) {
      flush(masses, above);
      for (MassSum& mass : masses) mass = MassSum{};
      above = 0;
      until_flush = max_steps;
    }

    // Who may win, or is inside the bracket?
    float least = bracket.low, reach = -infinity;
    if (!searches()) {
      reach = current_reach();
      least = fmaxf(least, f_.greedy ? reach : reach - max_noise);
    }
    const float most = fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3]));
    bool near = most >= least;
    const unsigned nears = __ballot_sync(all_lanes, near);
    if (nears != 0 || last) {
      const bool dense = !f_.greedy && __popc(nears) > dense_lanes;
      float limit = infinity;
      PhiloxWords words{};
      if (dense) {
        words = noise_key_.block(token / group_tokens, Purpose::gumbel);
        const uint32_t (&w)[4] = words.word;
        if (searches()) reach = current_reach();
        limit = 1.0f + exp2f((most - reach) * 1.44269504f);
        near = near && unit(min(min(w[0], w[1]), min(w[2], w[3]))) <= limit;
      }
      if (!dense || searches() || last || __any_sync(all_lanes, near)) {
        const int rounds = last ? group_tokens + 1 : group_tokens;  // the last one empties the list
#pragma unroll 1
        for (int j = 0; j < rounds; ++j) {
          const float z_j = pick(z, j);
          const bool inside = z_j >= bracket.low && !(z_j >= bracket.top);
          const bool may_win = near && z_j >= least && unit(pick(words.word, j)) <= limit;
          const bool wanted = (inside || may_win) && j < group_tokens;
          const unsigned lanes = __ballot_sync(all_lanes, wanted);
          if (wanted) {
            const int at = pending + rank_in(lanes);
            s_.pending_token[warp][at] = static_cast<int32_t>(token) + j;
            s_.pending_z[warp][at] = z_j;
          }
          pending += __popc(lanes);
          if (pending >= warp_size || (j == group_tokens && pending > 0)) {
            __syncwarp();
            const int taken = min(pending, warp_size);
            pending -= taken;
            const bool active = lane < taken;
            evaluate(active, active ? s_.pending_token[warp][pending + lane] : 0,
                     active ? s_.pending_z[warp][pending + lane] : -infinity, bracket);
            __syncwarp();
          }
        }
      }
    }
    best_.end_step(s_.select);
    if (last) return;
    token += group_tokens * sampler_threads;
  }
}

// Scores one token for each lane.
template <typename Row, typename Best, bool statistics>
__device__ void RowSampler<Row, Best, statistics>::evaluate(bool active, int32_t token, float z,
                                                            const Bracket& bracket) {
  const Word64 key = active ? candidate(token, z) : 0;
  if (z >= bracket.top) best_.offer(key);
  if (!searches()) return;
  const bool inside = active && !(z >= bracket.top);
  const unsigned lanes = __ballot_sync(all_lanes, inside);
  if (lanes == 0) return;
  unsigned at = 0;
  if (lane_index() == 0) at = atomicAdd(&state_.listed, static_cast<unsigned>(__popc(lanes)));
  at = __shfl_sync(all_lanes, at, 0) + rank_in(lanes);
  if (inside && at < static_cast<unsigned>(a_.list_capacity)) {
    list_z_[at] = z;
    list_key_[at] = key;
  }
}

template <typename Row, typename Best, bool statistics>
__device__ void RowSampler<Row, Best, statistics>::flush(const MassSum (&masses)[sum_count], uint32_t above) {
  Word64 sums[sum_count] = {masses[sum_all].total(), masses[sum_above].total() + above, masses[sum_kept].total(),
                            masses[sum_distance].total()};
#pragma unroll
  for (int i = 0; i < sum_count; ++i) {
    if (i >= sum_kept && !statistics) continue;
    sums[i] = warp_sum(sums[i]);
    if (lane_index() == 0) s_.sums[i][warp_index()] += sums[i];
  }
}

}  // namespace specbranch::cuda

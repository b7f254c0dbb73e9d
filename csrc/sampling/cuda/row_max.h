// The first launch of verify and draft_sample: the largest logit of every segment of every row, its lowest token, and
// whether the segment has a NaN; for top-p also the segment's mass, which only guides a guess (bracket.h). It also
// clears what the second launch adds to, because the workspace starts as garbage.
//
// Lower bound: the logits' bytes once. Segments are short so that all their loads are in flight together.
#pragma once

#include <algorithm>

#include "core/cuda/ptx.h"
#include "sampling/cuda/row_filters.h"

namespace specbranch::cuda {

constexpr int row_max_threads = 256;
constexpr int max_row_segments = 2 * warp_size;  // one warp merges them
constexpr Word64 nan_key = ~Word64{0};           // of a segment with a NaN: above all others

// What the blocks of a row add up in the second launch. Integers, so that their order does not matter.
struct RowState {
  Word64 best;     // key of the best candidate, where one is enough
  Word64 sums[4];  // see row_sampler.h
  unsigned listed;
  unsigned finished;  // blocks
};

// How rows are cut: from shapes alone, so that a captured graph stays valid. Enough segments for all multiprocessors of
// an H100 and none so small that its block would idle.
struct Segments {
  int32_t count, groups;  // per row, per segment

  Segments(int64_t rows, int64_t vocabulary, int64_t wanted_blocks, int64_t min_tokens, int64_t max_count) {
    const int64_t all = divide_up(vocabulary, group_tokens);
    const int64_t most = std::min({divide_up(vocabulary, min_tokens), max_count, wanted_blocks / rows});
    groups = static_cast<int32_t>(divide_up(all, std::max<int64_t>(most, 1)));
    count = static_cast<int32_t>(divide_up(all, groups));
  }
  static Segments for_max(int64_t rows, int64_t vocabulary) {
    return Segments(rows, vocabulary, /*wanted_blocks=*/4 * 132, /*min_tokens=*/1024, max_row_segments);
  }
};

struct RowMaxArguments {
  const void* logits;
  int64_t stride;
  AllowedRows allowed;
  int32_t vocabulary, segments, segment_groups;
  float mass_scale;         // log2(e) / temperature, or 0: no masses
  FiltersInMemory filters;  // or none: what mass_scale comes from
  Word64* maxima;           // [rows, segments]: keys of the largest logits
  float* masses;            // [rows, segments]: sums of exp((logit - largest) / temperature)
  RowState* state;          // [rows] or null
};

struct RowMaxShared {
  Word64 warp_best[row_max_threads / warp_size];
  float warp_mass[row_max_threads / warp_size];
  // Of filters in memory.
  float mass_scale;
  bool greedy, valid;
};

// What it finds is written by thread 0.
template <typename Row>
__device__ void find_row_max(const RowMaxArguments& a, RowMaxShared& shared) {
  const int64_t row_index = blockIdx.x / a.segments;
  const int32_t segment = static_cast<int32_t>(blockIdx.x % a.segments);
  if (a.state != nullptr && segment == 0 && threadIdx.x == 0) a.state[row_index] = RowState{};
  float mass_scale = a.mass_scale;
  bool nan = false;
  if (a.filters.first != nullptr) {
    if (threadIdx.x == 0) {
      const Filters given = a.filters.of_row(row_index), filters = in_range(given);
      shared.mass_scale = mass_scale_of(filters);
      shared.greedy = filters.greedy();
      shared.valid = given.valid();
    }
    __syncthreads();
    mass_scale = shared.mass_scale;
    nan = !shared.valid;  // the row is then as bad as one with a NaN
  }

  const Row row(a.logits, a.stride, a.allowed, row_index, a.vocabulary);
  const int32_t begin = segment * a.segment_groups;
  const int32_t end = row.groups() - begin < a.segment_groups ? row.groups() : begin + a.segment_groups;
  GroupReader<Row, row_max_threads> reader(row, begin + static_cast<int32_t>(threadIdx.x), end);
  float best = -infinity;
  int32_t token = group_tokens * begin;
  float mass = 0.0f, mass_max = lowest_finite;  // the sum is relative to the latter
  constexpr int unroll = 4;                     // loads in flight
  for (int32_t base = begin; base < end; base += unroll * row_max_threads) {
    Group groups[unroll];
#pragma unroll
    for (Group& group : groups) group = reader.next();
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const float (&x)[group_tokens] = groups[u].x;
      nan |= x[0] != x[0] || x[1] != x[1] || x[2] != x[2] || x[3] != x[3];
      const float most = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
      if (most > best) {
        best = most;
        const int place = x[0] == most ? 0 : x[1] == most ? 1 : x[2] == most ? 2 : 3;
        token = group_tokens * (base + u * row_max_threads + static_cast<int32_t>(threadIdx.x)) + place;
      }
    }
    if (mass_scale != 0.0f) {
      const float new_max = fmaxf(mass_max, best);
      mass *= exp2_approximate((mass_max - new_max) * mass_scale);
      mass_max = new_max;
#pragma unroll
      for (const Group& group : groups) {
#pragma unroll
        for (const float x : group.x) mass += exp2_approximate((x - mass_max) * mass_scale);
      }
    }
  }
  Word64 largest = warp_max(nan ? nan_key : candidate_key(best, token));
  if (lane_index() == 0) shared.warp_best[warp_index()] = largest;
  __syncthreads();
  for (const Word64 key : shared.warp_best) largest = larger(largest, key);
  if (threadIdx.x == 0) a.maxima[blockIdx.x] = largest;
  if (mass_scale == 0.0f) return;
  mass = warp_sum(mass * exp2_approximate((mass_max - fmaxf(key_score(largest), lowest_finite)) * mass_scale));
  if (lane_index() == 0) shared.warp_mass[warp_index()] = mass;
  __syncthreads();
  if (threadIdx.x != 0) return;
  mass = 0.0f;
  for (const float part : shared.warp_mass) mass += part;
  a.masses[blockIdx.x] = mass;
}

template <typename Row>
__global__ void __launch_bounds__(row_max_threads) row_max_kernel(const RowMaxArguments a) {
  find_row_max<Row>(a, *shared_memory<RowMaxShared>());
}

// False for a row with NaN, +inf, nothing but -inf, or values that overflow when scaled.
__device__ inline bool usable(Word64 max_key, float inverse_temperature) {
  const float max_logit = key_score(max_key), z_max = max_logit * inverse_temperature;
  return max_key != nan_key && max_logit < infinity && z_max < infinity && z_max > -infinity;
}

}  // namespace specbranch::cuda

// Temperature, top-k, top-p and min-p as the sampling kernels use them.
//
// They come as arguments, worked out by the host, or from device memory, so that a captured graph serves any of them.
// Then each block works them out again, by one thread because many devices are slow in double precision. Nothing can be
// raised there: filters that are out of range count as temperature 0, and their rows cannot be sampled (row_max.h).
#pragma once

#include "sampling/cuda/bracket.h"
#include "sampling/filters.h"

namespace specbranch::cuda {

// Of the exponentials that guide the search for top-p; 0 without it.
SPECBRANCH_HD inline float mass_scale_of(const Filters& f) {
  return f.searches_mass() ? f.inverse_temperature() * 1.44269504f : 0.0f;
}

__device__ inline Filters in_range(const Filters& f) { return f.valid() ? f : Filters{0.0, 0.0, 1.0, 0.0}; }

struct RowFilters {
  float inverse_temperature, min_p;
  float min_p_distance;  // no token further below the largest is kept by min_p
  bool greedy, search_count, search_mass;
  double top_k, top_p;
  float mass_scale;
  BracketPlan bracket_plan;

  RowFilters() = default;
  // max_segments: of row_max.h. list_capacity: of row_sampler.h.
  SPECBRANCH_HD RowFilters(const Filters& f, int64_t vocabulary, int64_t max_segments, int64_t list_capacity)
      : inverse_temperature(f.inverse_temperature()),
        min_p(f.greedy() ? 0.0f : static_cast<float>(f.min_p)),
        min_p_distance(min_p > 0.0f ? logf(min_p) - 1e-2f : 0.0f),
        greedy(f.greedy()),
        search_count(f.searches_count(vocabulary)),
        search_mass(f.searches_mass()),
        top_k(f.top_k),
        top_p(f.top_p),
        mass_scale(mass_scale_of(f)),
        bracket_plan(vocabulary, max_segments, /*short_list=*/list_capacity / 4, f.top_k, f.top_p,
                     inverse_temperature) {}
};

}  // namespace specbranch::cuda

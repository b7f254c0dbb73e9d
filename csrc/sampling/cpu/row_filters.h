// Temperature, top-k, top-p and min-p as the passes over a row use them.
#pragma once

#include "sampling/cpu/bracket.h"
#include "sampling/filters.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

struct RowFilters {
  double top_k, top_p;
  float inverse_temperature, min_p;
  bool greedy, search_count, search_mass;
  bool guesses_mass;  // not where top-k leaves a list anyway

  RowFilters(const Filters& f, int64_t vocabulary)
      : top_k(f.top_k),
        top_p(f.top_p),
        inverse_temperature(f.inverse_temperature()),
        min_p(f.greedy() ? 0.0f : static_cast<float>(f.min_p)),
        greedy(f.greedy()),
        search_count(f.searches_count(vocabulary)),
        search_mass(f.searches_mass()),
        guesses_mass(search_mass && vocabulary > short_list && (!search_count || f.top_k > 0.5 * short_list)) {}
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

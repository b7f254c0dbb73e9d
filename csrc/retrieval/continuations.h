// What followed the places where the newest tokens of a text occurred before. No Python, no torch.
#pragma once

#include <cstdint>
#include <vector>

#include "retrieval/suffix_index.h"

namespace specbranch {

// A trie in columns, level by level: see Continuations in _planning.pyi.
struct Continuations {
  std::vector<int64_t> token, parent, match, count, total, source, position, near;

  int64_t size() const { return static_cast<int64_t>(token.size()); }
};

struct ContinuationLimits {
  int64_t occurrences = 32, depth = 64, least_match = 1, most_nodes = 240;
};

// Positions of one index, `first` to `last`, where an occurrence is more likely to go on than its match says.
struct Near {
  int64_t index = -1, first = 0, last = -1;

  bool has(int64_t place, int64_t position) const { return place == index && first <= position && position <= last; }
};

// See continuations in _planning.pyi. The first index is that of the text itself; the last `drafted` tokens of the
// context are not in it. Raises std::invalid_argument.
Continuations continuations(const std::vector<const SuffixIndex*>& indexes, const std::vector<int32_t>& context,
                            int64_t drafted, const ContinuationLimits& limits, const Near& near);

}  // namespace specbranch

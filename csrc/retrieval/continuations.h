// What followed the places where the newest tokens of a text occurred before. No Python, no torch.
#pragma once

#include <cstdint>
#include <vector>

#include "retrieval/suffix_index.h"

namespace specbranch {

// A trie in columns, level by level: see Continuations in _planning.pyi.
struct Continuations {
  std::vector<int64_t> token, parent, match, count, total, source;

  int64_t size() const { return static_cast<int64_t>(token.size()); }
};

struct ContinuationLimits {
  int64_t occurrences = 32, depth = 64, least_match = 1, most_nodes = 240;
};

// See continuations in _planning.pyi. The first index is that of the text itself; the last `drafted` tokens of the
// context are not in it. Raises std::invalid_argument.
Continuations continuations(const std::vector<const SuffixIndex*>& indexes, const std::vector<int32_t>& context,
                            int64_t drafted, const ContinuationLimits& limits);

}  // namespace specbranch

// What speaks for one retrieved token.
#pragma once

#include <cstdint>

#include "retrieval/continuations.h"

namespace specbranch {

// match: tokens of the text before it that were found, too. count: of `total` occurrences those that go on with it.
// source: the index that it is from, 0 for the text's own. near: found where the text was expected to go on. first: no
// other one ranks higher in its place.
struct Found {
  int64_t match, count, total, source;
  bool near, first;
};

inline Found found_at(const Continuations& found, int64_t i) {
  const bool first = i == 0 || found.parent[i - 1] != found.parent[i];  // siblings stand together, best first
  return {found.match[i], found.count[i], found.total[i], found.source[i], found.near[i] != 0, first};
}

}  // namespace specbranch

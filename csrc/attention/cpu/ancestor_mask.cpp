#include "attention/ancestor_mask.h"

#include "core/isa.h"

namespace specbranch::cpu::SPECBRANCH_ISA {

void ancestor_mask(const AncestorMaskParams& p) {
  const int64_t n = p.parents.shape[0], words = p.ancestors.shape[1];
  const int64_t* parents = p.parents.as<const int64_t>();
  int64_t* depths = p.depths.as<int64_t>();
  uint64_t* bits = p.ancestors.as<uint64_t>();
  for (int64_t i = 0; i < n; ++i) {
    uint64_t* row = bits + i * words;
    const uint64_t* above = parents[i] < 0 ? nullptr : bits + parents[i] * words;
    for (int64_t w = 0; w < words; ++w) row[w] = above ? above[w] : 0;
    row[i / 64] |= uint64_t{1} << i % 64;
    depths[i] = parents[i] < 0 ? 0 : depths[parents[i]] + 1;
  }
}

}  // namespace specbranch::cpu::SPECBRANCH_ISA

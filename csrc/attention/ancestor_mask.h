// ancestor_mask: from the parents of a tree's nodes to the ancestor bits that tree_attention reads.
#pragma once

#include "core/tensor.h"

namespace specbranch {

struct AncestorMaskParams {
  Launch launch;
  Tensor parents;    // int64 [n]: an earlier node, or -1 for a root
  Tensor ancestors;  // int64 [n, words], words = ceil(n / 64), contiguous, written: bit j of row i is bit j % 64 of
                     // word j / 64 and says that j is i or an ancestor of i
  Tensor depths;     // int64 [n], contiguous, written: 0 for a root
};

// Throws std::invalid_argument naming the tensor and what was expected.
void check_ancestor_mask(const AncestorMaskParams& params);

// The parameters must have passed the check.
void run_ancestor_mask(const AncestorMaskParams& params);

}  // namespace specbranch

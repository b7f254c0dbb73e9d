// ancestor_mask's checks and the choice of its kernel.
#include "attention/ancestor_mask.h"

#include "core/dispatch.h"

namespace specbranch {

void check_ancestor_mask(const AncestorMaskParams& p) {
  check_shape(p.parents, {-1}, "[n]");
  check_dtype(p.parents, Dtype::int64);
  check_contiguous(p.parents);
  const int64_t n = p.parents.shape[0];
  check_shape(p.ancestors, {n, (n + 63) / 64}, "[n, words]");
  check_dtype(p.ancestors, Dtype::int64);
  check_contiguous(p.ancestors);
  check_shape(p.depths, {n}, "[n]");
  check_dtype(p.depths, Dtype::int64);
  check_contiguous(p.depths);
  if (p.launch.on_cuda()) return;  // the kernel marks what is wrong
  const int64_t* parents = p.parents.as<const int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    if (parents[i] < -1 || parents[i] >= i) {
      fail("parents: expected an earlier node or -1 for node " + std::to_string(i) + ", got " +
           std::to_string(parents[i]));
    }
  }
}

SPECBRANCH_DISPATCH(ancestor_mask, AncestorMaskParams)

}  // namespace specbranch

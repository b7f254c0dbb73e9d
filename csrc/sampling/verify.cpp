// verify's checks and the choice of its kernel.
#include "sampling/verify.h"

#include "core/dispatch.h"

namespace specbranch {

void check_verify(const VerifyParams& p) {
  check_sampling_inputs(p.target_logits, p.positions, p.seed);
  check_filters(p.filters);
  const int64_t n = p.target_logits.shape[0];
  for (const Tensor* t : {&p.tokens, &p.parents, &p.target_tokens, &p.path}) {
    check_shape(*t, {n}, "[n]");
    check_dtype(*t, Dtype::int64);
    check_contiguous(*t);
  }
  if (p.launch.on_cuda()) return;  // the kernel copes with any parents
  const int64_t* parents = p.parents.as<const int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    if (parents[i] < -1 || parents[i] >= i) {
      fail("parents: expected an earlier node or -1 for node " + std::to_string(i) + ", got " +
           std::to_string(parents[i]));
    }
  }
}

SPECBRANCH_DISPATCH(verify, VerifyParams)

}  // namespace specbranch

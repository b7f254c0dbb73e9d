// verify_rejection's checks and the choice of its kernel.
#include "sampling/verify_rejection.h"

#include "core/dispatch.h"

namespace specbranch {

void check_verify_rejection(const VerifyRejectionParams& p) {
  check_sampling_inputs(p.target_logits, p.positions);
  check_seed(p.seed);
  check_filters(p.filters);
  if (p.has_allowed) check_allowed(p.allowed, p.target_logits);
  const int64_t n = p.target_logits.shape[0], vocabulary = p.target_logits.shape[1];
  if (vocabulary > max_rejection_vocabulary) {
    fail("target_logits: expected at most 2^22 tokens, got " + shape_text(p.target_logits));
  }
  check_shape(p.draft_logits, {n - 1, vocabulary}, "[n - 1, V]");
  check_dtype(p.draft_logits, p.target_logits.dtype);
  if (n > 1) check_last_dim_contiguous(p.draft_logits);
  check_shape(p.tokens, {n}, "[n]");
  check_dtype(p.tokens, Dtype::int64);
  check_contiguous(p.tokens);
}

SPECBRANCH_DISPATCH(verify_rejection, VerifyRejectionParams)

}  // namespace specbranch

// draft_sample's checks and the choice of its kernel.
#include "sampling/draft_sample.h"

#include "core/dispatch.h"

namespace specbranch {

void check_draft_sample(const DraftSampleParams& p) {
  check_sampling_inputs(p.draft_logits, p.positions);
  check_seeds(p.seed, p.draft_logits.shape[0]);
  check_filters(p.filters);
  if (p.has_allowed) check_allowed(p.allowed, p.draft_logits);
  const int64_t b = p.draft_logits.shape[0], k = p.tokens.dims == 2 ? p.tokens.shape[1] : 0;
  if (k < 1 || k > p.draft_logits.shape[1]) {
    fail("k: expected 1 to V = " + std::to_string(p.draft_logits.shape[1]) + ", got " + std::to_string(k));
  }
  check_dtype(p.tokens, Dtype::int64);
  for (const Tensor* t : {&p.tokens, &p.scores, &p.confidence}) {
    check_shape(*t, {b, k}, "[b, k]");
    check_contiguous(*t);
  }
  check_shape(p.entropy, {b}, "[b]");
  for (const Tensor* t : {&p.scores, &p.confidence, &p.entropy}) check_dtype(*t, Dtype::float32);
}

SPECBRANCH_DISPATCH(draft_sample, DraftSampleParams)

}  // namespace specbranch

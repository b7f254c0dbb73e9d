// draft_sample: the draft's k best candidates under the target's noise, with its confidence and entropy.
#pragma once

#include "sampling/filters.h"

namespace specbranch {

struct DraftSampleParams {
  Launch launch;
  Tensor draft_logits;  // float32, bfloat16 or float16 [b, V]
  Tensor positions;     // int64 [b], of the token that each row predicts
  Tensor seed;          // int64 [], or [b]
  Filters filters;
  FiltersInMemory filters_in_memory;
  bool has_allowed;
  Tensor allowed;     // see check_allowed; not without has_allowed
  Tensor tokens;      // int64 [b, k], written, best first, padded with -1
  Tensor scores;      // float32 [b, k], written: scaled logit + noise
  Tensor confidence;  // float32 [b, k], written: the draft's probability
  Tensor entropy;     // float32 [b], written: nats
  RowReport* report;  // written

  // Rows with a seed or filters of their own are of several texts: one that cannot be sampled is not reported, but has
  // tokens -1, scores -inf, confidence 0 and entropy NaN.
  bool by_row() const { return seed.dims == 1 || filters_in_memory.by_row; }
};

void check_draft_sample(const DraftSampleParams& params);
void run_draft_sample(const DraftSampleParams& params);

namespace cuda {
// Bytes of workspace for b rows of V logits and k candidates; any_filters: where they are in memory.
int64_t draft_sample_workspace(int64_t rows, int64_t vocabulary, int64_t k, const Filters& filters, bool any_filters);
}  // namespace cuda

}  // namespace specbranch

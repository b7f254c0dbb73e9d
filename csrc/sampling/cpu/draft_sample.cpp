#include "sampling/draft_sample.h"

#include "sampling/cpu/row_sampler.h"

namespace specbranch::cpu::SPECBRANCH_ISA {

void draft_sample(const DraftSampleParams& p) {
  const int64_t rows = p.draft_logits.shape[0], k = p.tokens.shape[1];
  Buffer<Candidate> best(rows * k);
  Buffer<RowSample> samples(rows);
  const SampleRequest request{&p.draft_logits,
                              p.positions.as<const int64_t>(),
                              p.seed.as<const int64_t>(),
                              p.seed.dims == 1,
                              p.filters_in_memory.by_row ? p.filters_in_memory.first : &p.filters,
                              p.filters_in_memory.by_row,
                              k,
                              /*statistics=*/true,
                              p.launch.threads,
                              /*more_logits=*/nullptr,
                              /*parents=*/nullptr,
                              /*reports=*/!p.by_row(),
                              p.has_allowed ? &p.allowed : nullptr};
  for (int64_t i = 0; i < rows; ++i) samples[i].count = 0;
  *p.report = sample_rows(request, best.at(0), samples.at(0));
  if (p.report->problem != RowReport::none) return;

  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      const int64_t at = i * k + j;
      const bool found = j < samples[i].count;
      p.tokens.as<int64_t>()[at] = found ? best[at].token : -1;
      p.scores.as<float>()[at] = found ? best[at].score : -HUGE_VALF;
      p.confidence.as<float>()[at] = found ? static_cast<float>(samples[i].probability(best[at].z)) : 0.0f;
    }
    p.entropy.as<float>()[i] = samples[i].count > 0 ? static_cast<float>(samples[i].entropy) : NAN;
  }
}

}  // namespace specbranch::cpu::SPECBRANCH_ISA

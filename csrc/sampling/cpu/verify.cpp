#include "sampling/verify.h"

#include "sampling/cpu/row_sampler.h"

namespace specbranch::cpu::SPECBRANCH_ISA {

void verify(const VerifyParams& p) {
  const int64_t n = p.target_logits.shape[0];
  Buffer<Candidate> best(n);
  Buffer<RowSample> samples(n);
  const SampleRequest request{&p.target_logits,
                              p.positions.as<const int64_t>(),
                              static_cast<uint64_t>(*p.seed.as<const int64_t>()),
                              p.filters,
                              /*k=*/1,
                              /*statistics=*/false,
                              p.launch.threads,
                              /*more_logits=*/nullptr,
                              p.parents.as<const int64_t>()};
  for (int64_t i = 0; i < n; ++i) samples[i].count = 0;
  *p.report = sample_rows(request, best.at(0), samples.at(0));
  if (p.report->problem != RowReport::none) return;

  int64_t* target_tokens = p.target_tokens.as<int64_t>();
  int64_t* path = p.path.as<int64_t>();
  const int64_t* tokens = p.tokens.as<const int64_t>();
  const int64_t* parents = p.parents.as<const int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    target_tokens[i] = samples[i].count > 0 ? best[i].token : -1;
    path[i] = -1;
  }
  // Children come after their parents, so one sweep walks the whole path.
  int64_t node = 0, accepted = 0;
  for (int64_t child = 1; child < n; ++child) {
    if (parents[child] != node || tokens[child] != target_tokens[node]) continue;
    path[accepted++] = child;
    node = child;
  }
  *p.accepted.as<int64_t>() = accepted;
  *p.next_token.as<int64_t>() = target_tokens[node];
}

}  // namespace specbranch::cpu::SPECBRANCH_ISA

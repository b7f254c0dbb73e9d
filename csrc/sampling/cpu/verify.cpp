#include "sampling/verify.h"

#include "sampling/cpu/row_sampler.h"

namespace specbranch::cpu::SPECBRANCH_ISA {
namespace {

// The text's tree begins at `root`, or is not there, and ends before `end`.
void walk(const VerifyParams& p, int64_t text, int64_t root, int64_t end) {
  const int64_t* tokens = p.tokens.as<const int64_t>();
  const int64_t* parents = p.parents.as<const int64_t>();
  const int64_t* target_tokens = p.target_tokens.as<const int64_t>();
  int64_t& accepted = p.accepted.as<int64_t>()[text];
  int64_t& next_token = p.next_token.as<int64_t>()[text];
  accepted = 0;
  next_token = -1;
  if (root < 0) return;
  for (int64_t i = root; i < end; ++i) {
    if (target_tokens[i] < 0 && counts_in_tree(parents, i, root)) return;
  }
  // Children come after their parents, so one sweep walks the whole path.
  int64_t* path = p.path.as<int64_t>() + root;
  int64_t node = root;
  for (int64_t child = root + 1; child < end; ++child) {
    if (parents[child] != node || tokens[child] != target_tokens[node]) continue;
    path[accepted++] = child;
    node = child;
  }
  next_token = target_tokens[node];
}

}  // namespace

void verify(const VerifyParams& p) {
  const int64_t n = p.target_logits.shape[0];
  Buffer<Candidate> best(n);
  Buffer<RowSample> samples(n);
  const SampleRequest request{&p.target_logits,
                              p.positions.as<const int64_t>(),
                              p.seed.as<const int64_t>(),
                              p.seed.dims == 1,
                              p.filters_in_memory.by_row ? p.filters_in_memory.first : &p.filters,
                              p.filters_in_memory.by_row,
                              /*k=*/1,
                              /*statistics=*/false,
                              p.launch.threads,
                              /*more_logits=*/nullptr,
                              p.parents.as<const int64_t>(),
                              /*reports=*/!p.has_roots,
                              p.has_allowed ? &p.allowed : nullptr};
  for (int64_t i = 0; i < n; ++i) samples[i].count = 0;
  *p.report = sample_rows(request, best.at(0), samples.at(0));
  if (p.report->problem != RowReport::none) return;

  for (int64_t i = 0; i < n; ++i) {
    p.target_tokens.as<int64_t>()[i] = samples[i].count > 0 ? best[i].token : -1;
    p.path.as<int64_t>()[i] = -1;
  }
  const int64_t whole_call = 0;
  const int64_t* roots = p.has_roots ? p.roots.as<const int64_t>() : &whole_call;
  const int64_t texts = p.has_roots ? p.roots.shape[0] : 1;
  for (int64_t j = 0; j < texts; ++j) walk(p, j, roots[j], j + 1 < texts && roots[j + 1] >= 0 ? roots[j + 1] : n);
}

}  // namespace specbranch::cpu::SPECBRANCH_ISA

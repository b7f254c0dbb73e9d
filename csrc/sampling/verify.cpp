// verify's checks and the choice of its kernel.
#include "sampling/verify.h"

#include "core/dispatch.h"

namespace specbranch {
namespace {

void check_roots(const VerifyParams& p, int64_t n) {
  const int64_t* roots = p.roots.as<const int64_t>();
  for (int64_t j = 0; j < p.roots.shape[0]; ++j) {
    const int64_t before = j > 0 ? roots[j - 1] : -1;
    const bool ended = j > 0 && before < 0;
    if (roots[j] == -1 || (!ended && roots[j] > before && roots[j] < n)) continue;
    const std::string rows = "a row above " + std::to_string(before) + " and below n = " + std::to_string(n) + " or -1";
    fail("roots: expected " + (ended ? "-1, as before it," : rows) + " for text " + std::to_string(j) + ", got " +
         std::to_string(roots[j]));
  }
}

// Parents are in their child's tree and come before it.
void check_parents(const VerifyParams& p, int64_t n) {
  const int64_t* parents = p.parents.as<const int64_t>();
  const int64_t* roots = p.roots.as<const int64_t>();
  const int64_t texts = p.has_roots ? p.roots.shape[0] : 0;
  int64_t root = p.has_roots ? n : 0, next = 0;  // n: before the first root
  for (int64_t i = 0; i < n; ++i) {
    if (next < texts && roots[next] == i) root = roots[next++];
    if (parents[i] == -1 || (parents[i] >= root && parents[i] < i)) continue;
    std::string expected = "an earlier node or -1";
    if (parents[i] >= 0 && parents[i] < i) {
      expected = root == n ? "-1, as no root comes before,"
                           : "one of its tree, from row " + std::to_string(root) + " on, or -1";
    }
    fail("parents: expected " + expected + " for node " + std::to_string(i) + ", got " + std::to_string(parents[i]));
  }
}

}  // namespace

void check_verify(const VerifyParams& p) {
  check_sampling_inputs(p.target_logits, p.positions);
  const int64_t n = p.target_logits.shape[0];
  check_seeds(p.seed, n);
  check_filters(p.filters);
  if (p.has_allowed) check_allowed(p.allowed, p.target_logits);
  for (const Tensor* t : {&p.tokens, &p.parents, &p.target_tokens, &p.path}) {
    check_shape(*t, {n}, "[n]");
    check_dtype(*t, Dtype::int64);
    check_contiguous(*t);
  }
  if (p.has_roots) {
    check_shape(p.roots, {-1}, "[s]");
    check_dtype(p.roots, Dtype::int64);
    check_contiguous(p.roots);
    for (const Tensor* t : {&p.accepted, &p.next_token}) check_shape(*t, {p.roots.shape[0]}, "[s]");
  }
  if (p.launch.on_cuda()) return;  // the kernel copes with any roots and parents
  if (p.has_roots) check_roots(p, n);
  check_parents(p, n);
}

SPECBRANCH_DISPATCH(verify, VerifyParams)

}  // namespace specbranch

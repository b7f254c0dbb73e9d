// verify: the target's own token at every tree node, and the path of drafted tokens that equal them.
#pragma once

#include "sampling/filters.h"

namespace specbranch {

// n tree nodes; node 0 is the root, parents come before children, -1 in parents elsewhere marks an unused node: it is
// never accepted, and a row that cannot be sampled gives it target token -1 and does no harm.
//
// With roots the nodes are those of s texts: a tree begins at its root and ends before the next one; what lies before
// the first is in no tree. A row that cannot be sampled is then not reported: its target token is -1, and the text that
// needs it has nothing accepted and next_token -1. A root of -1, at the end, is of a text that is not there, with the
// same result.
struct VerifyParams {
  Launch launch;
  Tensor target_logits;  // float32, bfloat16 or float16 [n, V]: row i follows node i
  Tensor tokens;         // int64 [n], the root's is ignored
  Tensor parents;        // int64 [n]
  Tensor positions;      // int64 [n], of the token that row i predicts
  Tensor seed;           // int64 [], or [n]
  Filters filters;
  FiltersInMemory filters_in_memory;
  bool has_roots;
  Tensor roots;  // int64 [s]; not without has_roots
  bool has_allowed;
  Tensor allowed;        // see check_allowed; not without has_allowed
  Tensor target_tokens;  // int64 [n], written
  Tensor path;           // int64 [n], written: accepted nodes from each root's place on, padded with -1
  Tensor accepted;       // int64 [], or [s] with roots, written: how many nodes of path
  Tensor next_token;     // likewise
  RowReport* report;     // written
};

void check_verify(const VerifyParams& params);
void run_verify(const VerifyParams& params);

namespace cuda {
// Bytes of workspace for n rows of V logits; any_filters: where they are in memory.
int64_t verify_workspace(int64_t rows, int64_t vocabulary, const Filters& filters, bool any_filters);
}  // namespace cuda

}  // namespace specbranch

// verify: the target's own token at every tree node, and the path of drafted tokens that equal them.
#pragma once

#include "sampling/filters.h"

namespace specbranch {

// n tree nodes; node 0 is the root, parents come before children, -1 in parents elsewhere marks an unused node: it is
// never accepted, and a row that cannot be sampled gives it target token -1 and does no harm.
struct VerifyParams {
  Launch launch;
  Tensor target_logits;  // float32, bfloat16 or float16 [n, V]: row i follows node i
  Tensor tokens;         // int64 [n], the root's is ignored
  Tensor parents;        // int64 [n]
  Tensor positions;      // int64 [n], of the token that row i predicts
  Tensor seed;           // int64 []
  Filters filters;
  const Filters* filters_in_memory;  // of a CUDA device, or null: what the kernel reads in place of `filters`
  Tensor target_tokens;              // int64 [n], written
  Tensor path;                       // int64 [n], written: accepted nodes, padded with -1
  Tensor accepted;                   // int64 [], written: how many nodes of path
  Tensor next_token;                 // int64 [], written
  RowReport* report;                 // written
};

void check_verify(const VerifyParams& params);
void run_verify(const VerifyParams& params);

namespace cuda {
// Bytes of workspace for n rows of V logits; any_filters: where they are in memory.
int64_t verify_workspace(int64_t rows, int64_t vocabulary, const Filters& filters, bool any_filters);
}  // namespace cuda

}  // namespace specbranch

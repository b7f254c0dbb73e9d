#include "core/dispatch.h"

#include "attention/ancestor_mask.h"
#include "sampling/draft_sample.h"
#include "sampling/gumbel_noise.h"
#include "cache/kv_commit.h"
#include "linear/linear.h"
#include "attention/tree_attention.h"
#include "sampling/verify.h"
#include "sampling/verify_rejection.h"

namespace specbranch {

SPECBRANCH_DISPATCH(ancestor_mask, AncestorMaskParams)
SPECBRANCH_DISPATCH(draft_sample, DraftSampleParams)
SPECBRANCH_DISPATCH(gumbel_noise, GumbelNoiseParams)
SPECBRANCH_DISPATCH(kv_commit, KvCommitParams)
SPECBRANCH_DISPATCH(tree_attention, TreeAttentionParams)
SPECBRANCH_DISPATCH(verify, VerifyParams)
SPECBRANCH_DISPATCH(verify_rejection, VerifyRejectionParams)
SPECBRANCH_DISPATCH_CPU_ONLY(linear, LinearParams)

}  // namespace specbranch

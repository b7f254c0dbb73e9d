#include "dispatch.h"

#include "ancestor_mask.h"
#include "draft_sample.h"
#include "gumbel_noise.h"
#include "kv_commit.h"
#include "linear.h"
#include "tree_attention.h"
#include "verify.h"
#include "verify_rejection.h"

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

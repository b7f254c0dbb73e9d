// verify_rejection: classical speculative sampling of a drafted chain, token by token (Leviathan, Kalman and Matias,
// arXiv 2211.17192; Chen et al., arXiv 2302.01318) or as a block (Sun et al., arXiv 2403.10444, algorithm 2).
//
// This is an op for other decoders. The engine of this package does not call it: it verifies by comparing drafted
// tokens with the target's own draw (verify.h).
//
// The text has the target's law only if accepting and the residual use the same arithmetic. So both start from two
// numbers of a token: T = scale * q of the target and D = share * q of the draft. q is floor(2^40 * exp(z - z_max)) for
// a token that the filters keep, else 0; share is 1 / sum(q); scale is share times the chance p that the path so far is
// kept (1 when verifying token by token). The residual's weights max(T - D, 0) are summed as integers, so sums do not
// depend on their order. The next token is the first one whose running sum passes a uniform integer: a weight of 0 is
// never drawn, and rounding cannot run past the last token. (Gumbel noise over the residual would cost a logarithm and
// a Philox block for every token. The sums cost neither, and the sums of segments tell a block where to look.)
#pragma once

#include "core/philox.h"
#include "sampling/filters.h"

namespace specbranch {

// Row i of the target follows node i of the chain; row i of the draft is what tokens[i + 1] was drawn from. The first
// token of tokens[1:] outside the vocabulary ends the chain, and no row behind it is read.
struct VerifyRejectionParams {
  Launch launch;
  Tensor target_logits;  // float32, bfloat16 or float16 [n, V]
  Tensor draft_logits;   // the same dtype [n - 1, V]
  Tensor tokens;         // int64 [n], the root's is ignored
  Tensor positions;      // int64 [n], of the token that row i predicts
  Tensor seed;           // int64 []
  Filters filters;
  bool block;
  bool has_allowed;
  Tensor allowed;     // see check_allowed, for the target; the draft's row i has row i too; not without has_allowed
  Tensor accepted;    // int64 [], written
  Tensor next_token;  // int64 [], written
  RowReport* target_report;  // written on the CPU
  RowReport* draft_report;   // written on the CPU
};

constexpr int64_t max_rejection_vocabulary = int64_t{1} << 22;  // sums of 40-bit weights then fit 62 bits

void check_verify_rejection(const VerifyRejectionParams& params);
void run_verify_rejection(const VerifyRejectionParams& params);

namespace cuda {
// Bytes of workspace for n rows of the target and V logits.
int64_t verify_rejection_workspace(int64_t n, int64_t vocabulary, const Filters& filters);
}  // namespace cuda

// ---- The arithmetic that every implementation shares; doubles, no fused multiply-add.

inline namespace SPECBRANCH_ISA {
namespace rejection {

constexpr double two_to_30 = 1073741824.0, two_to_60 = two_to_30 * two_to_30, two_to_64 = two_to_60 * 16.0;

// The chance p that the path is kept with one more token, from its T and D > 0.
SPECBRANCH_HD inline double path_chance(double t, double d) {
  const double ratio = t / d;
  return ratio < 1.0 ? ratio : 1.0;
}

// The weight of a token in the residual. A row's weights sum up to 2^60 at most, apart from rounding.
SPECBRANCH_HD inline uint64_t residual_weight(double t, double d) {
  const double excess = t - d;
  return excess > 0.0 ? static_cast<uint64_t>(excess * two_to_60) : 0;
}

// Block verification: the chance that a path of chance p ends here, from its residual's sum.
SPECBRANCH_HD inline double block_chance(uint64_t residual_sum, double p) {
  if (!(p < 1.0)) return 1.0;
  const double r = static_cast<double>(residual_sum) / two_to_60;
  return r / (r + (1.0 - p));
}

// Coin i of a call is keyed by the call's first position, which no other call on the same text has: with block
// verification a coin behind the accepted tokens is looked at too, so it must not be tossed again.
SPECBRANCH_HD inline uint64_t random_integer(const NoiseKey& key, int64_t i, Purpose purpose) {
  const PhiloxWords words = key.block(static_cast<uint32_t>(i >> 1), purpose);
  const uint32_t high = (i & 1) != 0 ? words.word[2] : words.word[0];
  const uint32_t low = (i & 1) != 0 ? words.word[3] : words.word[1];
  return static_cast<uint64_t>(high) << 32 | low;
}
SPECBRANCH_HD inline bool says_yes(uint64_t coin, double chance) {  // never at chance 0, always at 1
  return !(chance < 1.0) || coin < static_cast<uint64_t>(chance * two_to_64);
}

// A uniform integer below `sum`.
SPECBRANCH_HD inline uint64_t below(uint64_t sum, uint64_t uniform) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(uniform) * sum >> 64);
}

}  // namespace rejection
}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

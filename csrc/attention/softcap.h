// A soft cap on scores: c * tanh(score / c). Scores come and leave in units of log2.
//
// Where the argument is small, tanh is its series times the score. The quotient of exponentials, which serves elsewhere,
// is off by a last bit of 1 there; times the cap that is c / 2^24, for a large cap more than the score itself.
#pragma once

#include <cfloat>

#include "core/isa.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

constexpr double log2_e = 1.4426950408889634;

struct SoftCap {
  float cap = 0.0f;   // in units of log2; 0: none
  float unit = 0.0f;  // a score times this is y = 2 log2(e) times tanh's argument

  SoftCap() = default;
  // 0, and a cap beyond the largest float32: none. From 1e-38 on both numbers are finite and the first is no subnormal.
  explicit SoftCap(double softcap) {
    if (softcap == 0.0 || softcap * log2_e > FLT_MAX) return;
    cap = static_cast<float>(softcap * log2_e);
    unit = static_cast<float>(2.0 / softcap);
  }
};

constexpr float series_limit = 0.5f;  // of y

// tanh(x) / x from y = 2 log2(e) x, for y up to the limit, to 1e-7.
template <typename F>
SPECBRANCH_HD inline F tanh_series(F y) {
  const F square = y * y;
  return ((square * -9.3521435e-5f + 1.9236258e-3f) * square - 4.0037751e-2f) * square + 1.0f;
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

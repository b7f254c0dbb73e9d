// The activation functions of feed-forward layers, with the same bits on every vector width and on CUDA devices.
#pragma once

#include "core/numerics.h"

namespace specbranch {

enum class Activation : int { silu, gelu_tanh };

inline namespace SPECBRANCH_ISA {

// x sigmoid(t) for t of x's sign. The exponential is of -|t|: nothing overflows, and nothing is subtracted. It counts as
// 0 for t below -87. NaN for a NaN and, as with torch's functions, for -inf.
template <typename F>
SPECBRANCH_HD inline F times_sigmoid(F x, F t) {
  using L = Lanes<F>;
  const F lowest = L::set(-88.0f), exponent = L::from_bits(L::bits(t) | INT32_MIN);
  const F e = exp_nonpositive(L::select(exponent > lowest, exponent, lowest));  // never of a NaN
  return L::select(t < L::set(0.0f), x * e, x) / (L::set(1.0f) + e);
}

// x / (1 + e^-x).
template <typename F>
SPECBRANCH_HD inline F silu(F x) {
  return times_sigmoid(x, x);
}

// x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as x sigmoid of twice tanh's argument.
template <typename F>
SPECBRANCH_HD inline F gelu_tanh(F x) {
  using L = Lanes<F>;
  return times_sigmoid(x, x * (L::set(0.0713548163f) * (x * x) + L::set(1.59576912f)));
}

template <Activation activation, typename F>
SPECBRANCH_HD inline F activated(F x) {
  if constexpr (activation == Activation::silu) {
    return silu(x);
  } else {
    return gelu_tanh(x);
  }
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

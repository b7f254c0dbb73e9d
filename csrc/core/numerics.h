// exp, log and the noise in plain float32 steps, in a fixed order and without fused multiply-add, so that the
// reference, the CPU kernels and the CUDA kernels give the same bits. Files that include this are compiled with
// -ffp-contract=off (nvcc: --fmad=false).
//
// F is float, or a vector of floats (simd.h); Lanes<F> says how to handle it.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/philox.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

template <typename F>
struct Lanes;

template <>
struct Lanes<float> {
  using Int = int32_t;
  SPECBRANCH_HD static float set(float x) { return x; }
  SPECBRANCH_HD static int32_t bits(float x) {
    int32_t i;
    memcpy(&i, &x, sizeof i);
    return i;
  }
  SPECBRANCH_HD static float from_bits(int32_t i) {
    float x;
    memcpy(&x, &i, sizeof x);
    return x;
  }
  SPECBRANCH_HD static float to_float(int32_t i) { return static_cast<float>(i); }
  SPECBRANCH_HD static int32_t to_exponent(int32_t i) { return static_cast<int32_t>(static_cast<uint32_t>(i) << 23); }
  SPECBRANCH_HD static float select(bool condition, float a, float b) { return condition ? a : b; }
};

// e^x for x <= 0; exactly 1 at 0 and exactly 0 below -87. Relative error below 2e-7.
template <typename F>
SPECBRANCH_HD inline F exp_nonpositive(F x) {
  using L = Lanes<F>;
  const F lowest = L::set(-87.0f);
  const F clamped = L::select(x < lowest, lowest, x);
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const F shifted = clamped * L::set(1.44269504f) + L::set(12582912.0f);
  const F n = shifted - L::set(12582912.0f);
  const F r = (clamped - n * L::set(0.693359375f)) - n * L::set(-2.12194440e-4f);
  F p = L::set(8.312498e-3f);
  p = p * r + L::set(4.189036e-2f);
  p = p * r + L::set(1.6667116e-1f);
  p = p * r + L::set(4.999923e-1f);
  const F value = (p * (r * r) + r) + L::set(1.0f);
  const F scaled = L::from_bits(L::bits(value) + L::to_exponent(L::bits(shifted)));  // value * 2^n
  return L::select(x < lowest, L::set(0.0f), scaled);
}

// log((1 + f) * 2^e) for f in [sqrt(1/2) - 1, sqrt(2) - 1].
template <typename F>
SPECBRANCH_HD inline F log_reduced(F f, F e) {
  using L = Lanes<F>;
  const F square = f * f;
  F p = L::set(7.0376836292e-2f);
  p = p * f + L::set(-1.1514610310e-1f);
  p = p * f + L::set(1.1676998740e-1f);
  p = p * f + L::set(-1.2420140846e-1f);
  p = p * f + L::set(1.4249322787e-1f);
  p = p * f + L::set(-1.6668057665e-1f);
  p = p * f + L::set(2.0000714765e-1f);
  p = p * f + L::set(-2.4999993993e-1f);
  p = p * f + L::set(3.3333331174e-1f);
  const F tail = (p * f) * square;
  const F low = (tail + e * L::set(-2.12194440e-4f)) - square * L::set(0.5f);
  return (f + low) + e * L::set(0.693359375f);
}

// x = (1 + f) * 2^e for a positive, normal x.
template <typename F>
SPECBRANCH_HD inline void split_for_log(F x, F& f, F& e) {
  using L = Lanes<F>;
  const auto bits = L::bits(x);
  const auto exponent = (bits - 0x3F3504F3) >> 23;  // 0x3F3504F3: sqrt(1/2)
  f = L::from_bits(bits - exponent * 0x800000) - L::set(1.0f);
  e = L::to_float(exponent);
}

template <typename F>
SPECBRANCH_HD inline F log_positive(F x) {
  F f, e;
  split_for_log(x, f, e);
  return log_reduced(f, e);
}

// A random word as a float, correctly rounded, from two exact halves.
template <typename F>
SPECBRANCH_HD inline F word_to_float(typename Lanes<F>::Int word) {
  using L = Lanes<F>;
  return L::to_float((word >> 16) & 0xFFFF) * L::set(65536.0f) + L::to_float(word & 0xFFFF);
}

constexpr float two_to_20 = 1048576.0f;
constexpr float two_to_40 = 1099511627776.0f;
constexpr double two_to_minus_40 = 9.094947017729282e-13;
constexpr float two_to_minus_32 = 2.3283064365386963e-10f;
constexpr float two_to_minus_33 = 1.1641532182693481e-10f;
constexpr float two_to_minus_64 = 5.421010862427522e-20f;
constexpr float two_to_minus_65 = 2.710505431213761e-20f;

// Standard Gumbel noise -log(E), E = -log(1 - v) exponential, from a word and, for words below 2^16, a second one.
// v lies in (0, 1): small v is extended by the second word, so that large noise has no cut-off at 2^-32; for large
// v the complement 1 - v comes from the complemented word, so that it is never 0.
template <typename F>
SPECBRANCH_HD inline F gumbel(typename Lanes<F>::Int word, typename Lanes<F>::Int tail_word) {
  using L = Lanes<F>;
  const F scaled = word_to_float<F>(word) * L::set(two_to_minus_32);
  const F tail = (scaled + word_to_float<F>(tail_word) * L::set(two_to_minus_64)) + L::set(two_to_minus_65);
  const auto has_tail = scaled < L::set(65536.0f * two_to_minus_32);
  const F v = L::select(has_tail, tail, scaled + L::set(two_to_minus_33));
  const F complement = word_to_float<F>(~word) * L::set(two_to_minus_32) + L::set(two_to_minus_33);
  F f, e;
  split_for_log(complement, f, e);
  const auto small = scaled < L::set(0.25f);  // there 1 - v rounds away what matters, and log1p needs no exponent
  f = L::select(small, -v, f);
  e = L::select(small, L::set(0.0f), e);
  return -log_positive(-log_reduced(f, e));
}

// The noise of one token, as every kernel must compute it.
SPECBRANCH_HD inline float token_noise(const NoiseKey& key, int64_t token) {
  const uint32_t word = key.word(token, Purpose::gumbel);
  const uint32_t tail = word < 65536u ? key.word(token, Purpose::gumbel_tail) : 0u;
  return gumbel<float>(static_cast<int32_t>(word), static_cast<int32_t>(tail));
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

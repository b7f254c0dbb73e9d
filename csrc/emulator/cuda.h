// The part of CUDA C++ that the CUDA kernels use, for g++ and clang++. Intrinsics are functions with CUDA's
// names and overloads; one that is missing here does not compile, so that nothing is emulated by chance.
// Files that include this need -fno-strict-aliasing (kernels load vectors from arrays of other types, as CUDA allows)
// and -ffp-contract=off (csrc/core/numerics.h).
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ kernels_use_shared_memory_of_T_instead_of_shared_variables
#define __constant__ static const

// ---- Bits.

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
  x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
  x = (x >> 4 & 0x0F0F0F0Fu) | (x & 0x0F0F0F0Fu) << 4;
  return __builtin_bswap32(x);
}
inline unsigned long long __brevll(unsigned long long x) {
  return static_cast<unsigned long long>(__brev(static_cast<unsigned>(x))) << 32 |
         __brev(static_cast<unsigned>(x >> 32));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  const unsigned long long both = static_cast<unsigned long long>(high) << 32 | low;
  return static_cast<unsigned>(both << (shift & 31u) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  const unsigned long long both = static_cast<unsigned long long>(high) << 32 | low;
  return static_cast<unsigned>(both >> (shift & 31u));
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  const unsigned long long low = 0xFFFFFFFFull;
  const unsigned long long a0 = a & low, a1 = a >> 32, b0 = b & low, b1 = b >> 32;
  const unsigned long long middle = (a0 * b0 >> 32) + (a1 * b0 & low) + (a0 * b1 & low);
  return a1 * b1 + (a1 * b0 >> 32) + (a0 * b1 >> 32) + (middle >> 32);
}

// ---- Arithmetic. The functions of <math.h> (fmaf, fminf, exp2f, …) are the host's.

#define SPECBRANCH_EMULATOR_MIN_MAX(type, a_type, b_type)                                             \
  constexpr type min(a_type a, b_type b) {                                                            \
    return static_cast<type>(a) < static_cast<type>(b) ? static_cast<type>(a) : static_cast<type>(b); \
  }                                                                                                   \
  constexpr type max(a_type a, b_type b) {                                                            \
    return static_cast<type>(a) > static_cast<type>(b) ? static_cast<type>(a) : static_cast<type>(b); \
  }
#define SPECBRANCH_EMULATOR_MIN_MAX_INTEGER(type)                          \
  SPECBRANCH_EMULATOR_MIN_MAX(type, type, type)                            \
  SPECBRANCH_EMULATOR_MIN_MAX(unsigned type, unsigned type, unsigned type) \
  SPECBRANCH_EMULATOR_MIN_MAX(unsigned type, type, unsigned type)          \
  SPECBRANCH_EMULATOR_MIN_MAX(unsigned type, unsigned type, type)
SPECBRANCH_EMULATOR_MIN_MAX_INTEGER(int)
SPECBRANCH_EMULATOR_MIN_MAX_INTEGER(long)
SPECBRANCH_EMULATOR_MIN_MAX_INTEGER(long long)
#undef SPECBRANCH_EMULATOR_MIN_MAX_INTEGER
#undef SPECBRANCH_EMULATOR_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
// a * b + c rounded down: the nearest float, or the one below when that is more than the exact value sum + error.
inline float __fmaf_rd(float a, float b, float c) {
  const float nearest = fmaf(a, b, c);
  const double product = static_cast<double>(a) * b, sum = product + c;  // the product is exact
  const double part = sum - product, error = (product - (sum - part)) + (c - part);
  if (sum == 0.0 && error == 0.0) return product == 0.0 && signbit(product) == signbit(c) ? nearest : -0.0f;
  if (nearest > sum || (nearest == sum && error < 0.0)) return nextafterf(nearest, -INFINITY);
  return nearest;
}

// ---- Half precision, with the bits that a GPU gives: NaN becomes 0x7FFF, and 0x7FFFFFFF on the way back.

struct __half {
  unsigned short bits;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
  const unsigned sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u, mantissa = x.bits & 0x3FFu;
  if (exponent == 31) return __uint_as_float(mantissa != 0 ? 0x7FFFFFFFu : sign | 0x7F800000u);
  if (exponent != 0) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24: exact
  return __uint_as_float(__float_as_uint(magnitude) | sign);
}

// Round to nearest, ties to even.
inline __half __float2half_rn(float x) {
  const unsigned bits = __float_as_uint(x), magnitude = bits & 0x7FFFFFFFu;
  const unsigned short sign = static_cast<unsigned short>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7F800000u) return {0x7FFF};
  unsigned half;
  if (magnitude >= 0x477FF000u) {  // 65520 and above round to infinity
    half = 0x7C00;
  } else if (magnitude >= 0x38800000u) {  // normal: rounding may carry into the exponent
    half = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  } else if (magnitude < 0x33000000u) {  // below half of the smallest subnormal
    half = 0;
  } else {  // subnormal: the significand counts units of 2^-24 after a shift by 14 to 24
    const unsigned significand = (magnitude & 0x7FFFFFu) | 0x800000u, shift = 126 - (magnitude >> 23);
    const unsigned rest = significand & ((1u << shift) - 1u), middle = 1u << (shift - 1);
    half = significand >> shift;
    half += rest > middle || (rest == middle && (half & 1u) != 0);
  }
  return {static_cast<unsigned short>(half | sign)};
}

// ---- Memory.

template <typename T>
T __ldcg(const T* p) {
  return *p;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

namespace specbranch::emulator {

// Replaces *p by update(*p) in one step and returns the old value. Bits are compared, so NaN and -0 are values too.
template <typename T, typename Update>
T atomic_update(T* p, Update update) {
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  static_assert(sizeof(T) == sizeof(Word), "4 or 8 bytes");
  maybe_yield();
  Word* word = reinterpret_cast<Word*>(p);
  Word old_bits = __atomic_load_n(word, __ATOMIC_SEQ_CST), new_bits;
  T old;
  do {
    memcpy(&old, &old_bits, sizeof old);
    const T updated = update(old);
    memcpy(&new_bits, &updated, sizeof updated);
  } while (!__atomic_compare_exchange_n(word, &old_bits, new_bits, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  maybe_yield();
  return old;
}

}  // namespace specbranch::emulator

#define SPECBRANCH_EMULATOR_ATOMIC_EXCHANGE(type)                                   \
  inline type atomicExch(type* p, type value) {                                     \
    return specbranch::emulator::atomic_update(p, [value](type) { return value; }); \
  }
#define SPECBRANCH_EMULATOR_ATOMIC_INTEGER(type)                                                            \
  SPECBRANCH_EMULATOR_ATOMIC_EXCHANGE(type)                                                                 \
  inline type atomicMin(type* p, type value) {                                                              \
    return specbranch::emulator::atomic_update(p, [value](type old) { return value < old ? value : old; }); \
  }                                                                                                         \
  inline type atomicMax(type* p, type value) {                                                              \
    return specbranch::emulator::atomic_update(p, [value](type old) { return value > old ? value : old; }); \
  }                                                                                                         \
  inline type atomicOr(type* p, type value) {                                                               \
    return specbranch::emulator::atomic_update(p, [value](type old) { return old | value; });               \
  }                                                                                                         \
  inline type atomicCAS(type* p, type expected, type value) {                                               \
    return specbranch::emulator::atomic_update(p, [=](type old) { return old == expected ? value : old; }); \
  }
SPECBRANCH_EMULATOR_ATOMIC_INTEGER(int)
SPECBRANCH_EMULATOR_ATOMIC_INTEGER(unsigned)
SPECBRANCH_EMULATOR_ATOMIC_INTEGER(unsigned long long)
SPECBRANCH_EMULATOR_ATOMIC_EXCHANGE(float)
#undef SPECBRANCH_EMULATOR_ATOMIC_INTEGER
#undef SPECBRANCH_EMULATOR_ATOMIC_EXCHANGE

// Integers wrap around.
inline unsigned atomicAdd(unsigned* p, unsigned value) {
  return specbranch::emulator::atomic_update(p, [value](unsigned old) { return old + value; });
}
inline int atomicAdd(int* p, int value) {
  return static_cast<int>(atomicAdd(reinterpret_cast<unsigned*>(p), static_cast<unsigned>(value)));
}
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long value) {
  return specbranch::emulator::atomic_update(p, [value](unsigned long long old) { return old + value; });
}
inline float atomicAdd(float* p, float value) {
  return specbranch::emulator::atomic_update(p, [value](float old) { return old + value; });
}

// ---- Barriers and warp collectives.

inline void __syncthreads(specbranch::emulator::Site site = SPECBRANCH_EMULATOR_HERE) {
  specbranch::emulator::block_barrier(site);
}

namespace specbranch::emulator {

enum class Shuffle { index, up, down, exclusive_or };

// The 64 bits that the lane named by `operand` gave.
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, unsigned operand, int width, Site site);
void sync_warp(unsigned mask, Site site);
unsigned ballot(unsigned mask, bool predicate, Site site);

template <typename T>
T shuffle_value(Shuffle kind, unsigned mask, T value, unsigned operand, int width, Site site) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle(kind, mask, bits, operand, width, site);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace specbranch::emulator

#define SPECBRANCH_EMULATOR_SHUFFLE(name, kind, operand_type, type)                              \
  inline type name(unsigned mask, type value, operand_type operand, int width = 32,              \
                   specbranch::emulator::Site site = SPECBRANCH_EMULATOR_HERE) {                 \
    return specbranch::emulator::shuffle_value(specbranch::emulator::Shuffle::kind, mask, value, \
                                               static_cast<unsigned>(operand), width, site);     \
  }
#define SPECBRANCH_EMULATOR_SHUFFLES(type)                            \
  SPECBRANCH_EMULATOR_SHUFFLE(__shfl_sync, index, int, type)          \
  SPECBRANCH_EMULATOR_SHUFFLE(__shfl_up_sync, up, unsigned, type)     \
  SPECBRANCH_EMULATOR_SHUFFLE(__shfl_down_sync, down, unsigned, type) \
  SPECBRANCH_EMULATOR_SHUFFLE(__shfl_xor_sync, exclusive_or, int, type)
SPECBRANCH_EMULATOR_SHUFFLES(int)
SPECBRANCH_EMULATOR_SHUFFLES(unsigned)
SPECBRANCH_EMULATOR_SHUFFLES(long)
SPECBRANCH_EMULATOR_SHUFFLES(unsigned long)
SPECBRANCH_EMULATOR_SHUFFLES(long long)
SPECBRANCH_EMULATOR_SHUFFLES(unsigned long long)
SPECBRANCH_EMULATOR_SHUFFLES(float)
SPECBRANCH_EMULATOR_SHUFFLES(double)
#undef SPECBRANCH_EMULATOR_SHUFFLES
#undef SPECBRANCH_EMULATOR_SHUFFLE

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, specbranch::emulator::Site site = SPECBRANCH_EMULATOR_HERE) {
  specbranch::emulator::sync_warp(mask, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              specbranch::emulator::Site site = SPECBRANCH_EMULATOR_HERE) {
  return specbranch::emulator::ballot(mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, specbranch::emulator::Site site = SPECBRANCH_EMULATOR_HERE) {
  return specbranch::emulator::ballot(mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, specbranch::emulator::Site site = SPECBRANCH_EMULATOR_HERE) {
  return specbranch::emulator::ballot(mask, predicate != 0, site) == mask;
}

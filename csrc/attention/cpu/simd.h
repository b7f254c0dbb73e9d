// What the attention kernel needs beyond core/cpu/simd.h: multiply-add, transposing loads, exp2 and tanh.
#pragma once

#include "attention/softcap.h"
#include "core/cpu/simd.h"

namespace specbranch::cpu::SPECBRANCH_ISA {

constexpr int lanes = simd_width;

typedef float Quad __attribute__((vector_size(16)));
typedef uint32_t UintQuad __attribute__((vector_size(16)));

using specbranch::store;
inline void store(float* p, FloatVec v) { store_unaligned(p, v); }

// Explicit, so that a row's bits cannot depend on how the compiler contracts one of several loop bodies.
inline FloatVec multiply_add(FloatVec a, FloatVec b, FloatVec c) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (FloatVec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline Quad load_quad(const float* p) {
  Quad v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline UintQuad load_bits(const void* p) {
  typedef uint16_t Half4 __attribute__((vector_size(8)));
  Half4 v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, UintQuad);
}

inline Quad load_quad(const Bfloat16* p) { return (Quad)(load_bits(p) << 16); }

inline Quad load_quad(const Float16* p) {
  const UintQuad bits = load_bits(p), magnitude = bits & 0x7fffu;
  // 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal.
  UintQuad wide = (UintQuad)((Quad)(magnitude << 13) * 0x1p112f);
  wide |= (UintQuad)(magnitude >= 0x7c00u) & 0x7f800000u;  // infinity and NaN
  return (Quad)(wide | ((bits & 0x8000u) << 16));
}

// Lane 4q + i of the result j is lane j of quads[4q + i]: `lanes` keys of four elements each become four vectors.
template <typename T>
inline void load_transposed(const T* const* rows, int64_t offset, FloatVec (&out)[4]) {
  FloatVec in[4];
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    const Quad a = load_quad(rows[i] + offset), b = load_quad(rows[i + 4] + offset);
    const Quad c = load_quad(rows[i + 8] + offset), d = load_quad(rows[i + 12] + offset);
    const auto low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
    const auto high = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7);
    in[i] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
    in[i] =
        __builtin_shufflevector(load_quad(rows[i] + offset), load_quad(rows[i + 4] + offset), 0, 1, 2, 3, 4, 5, 6, 7);
#else
    in[i] = load_quad(rows[i] + offset);
#endif
  }
#if defined(__AVX512F__)
#define SPECBRANCH_ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define SPECBRANCH_ZIP_HIGH(a, b) \
  __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define SPECBRANCH_PAIR_LOW(a, b) \
  __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define SPECBRANCH_PAIR_HIGH(a, b) \
  __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#elif defined(__AVX2__)
#define SPECBRANCH_ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define SPECBRANCH_ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define SPECBRANCH_PAIR_LOW(a, b) __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define SPECBRANCH_PAIR_HIGH(a, b) __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#else
#define SPECBRANCH_ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define SPECBRANCH_ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define SPECBRANCH_PAIR_LOW(a, b) __builtin_shufflevector(a, b, 0, 1, 4, 5)
#define SPECBRANCH_PAIR_HIGH(a, b) __builtin_shufflevector(a, b, 2, 3, 6, 7)
#endif
  const FloatVec low0 = SPECBRANCH_ZIP_LOW(in[0], in[1]), low1 = SPECBRANCH_ZIP_LOW(in[2], in[3]);
  const FloatVec high0 = SPECBRANCH_ZIP_HIGH(in[0], in[1]), high1 = SPECBRANCH_ZIP_HIGH(in[2], in[3]);
  out[0] = SPECBRANCH_PAIR_LOW(low0, low1);
  out[1] = SPECBRANCH_PAIR_HIGH(low0, low1);
  out[2] = SPECBRANCH_PAIR_LOW(high0, high1);
  out[3] = SPECBRANCH_PAIR_HIGH(high0, high1);
}

// 2^(x - base) for x <= base and an integer base, to about 1e-7 relative; 0 when x lies 126 or more below; exactly 1 at
// base; NaN for NaN. The fraction of x alone decides the mantissa: another base gives the same bits times a power of
// two.
inline FloatVec exp2_below(FloatVec x, float base) {
  const FloatVec smallest = broadcast(base - 126.0f), magic = broadcast(0x1.8p23f);
  const FloatVec clamped = select(x < smallest, smallest, x);
  const FloatVec shifted = clamped + magic;  // its low bits hold x rounded to an integer
  const FloatVec f = clamped - (shifted - magic);
  FloatVec y = broadcast(1.5403530e-4f);  // Taylor coefficients ln(2)^k / k!; |f| <= 1/2
  y = multiply_add(y, f, broadcast(1.33335581e-3f));
  y = multiply_add(y, f, broadcast(9.61812911e-3f));
  y = multiply_add(y, f, broadcast(5.55041087e-2f));
  y = multiply_add(y, f, broadcast(2.40226507e-1f));
  y = multiply_add(y, f, broadcast(6.93147181e-1f));
  y = multiply_add(y, f, broadcast(1.0f));
  const IntVec power = (((IntVec)shifted - static_cast<int32_t>(base)) << 23) + 0x3f800000;
  y *= (FloatVec)power;
  return select(x < smallest, FloatVec{}, y);
}

// 2^x for x <= 0.
inline FloatVec exp2_nonpositive(FloatVec x) { return exp2_below(x, 0.0f); }
inline float exp2_nonpositive(float x) { return exp2_nonpositive(broadcast(x))[0]; }

inline FloatVec soft_capped(FloatVec score, const SoftCap& softcap) {
  const FloatVec y = score * softcap.unit;
  const IntVec sign = (IntVec)y & INT32_MIN;
  const FloatVec magnitude = (FloatVec)((IntVec)y & INT32_MAX), e = exp2_nonpositive(-magnitude);
  const FloatVec tanh = (FloatVec)((IntVec)((1.0f - e) / (1.0f + e)) | sign);
  return select((IntVec)(magnitude < series_limit), score * tanh_series(y), softcap.cap * tanh);
}

}  // namespace specbranch::cpu::SPECBRANCH_ISA

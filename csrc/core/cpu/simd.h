// Vectors of the level that a file is compiled for, written with the GCC and Clang vector extensions; intrinsics
// only where those generate poor code. Arithmetic and comparison operators work lane by lane; a comparison gives
// an IntVec of 0 and -1.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "core/isa.h"
#include "core/numerics.h"
#include "core/storage.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

#if defined(__AVX512F__)
constexpr int simd_width = 16;
#elif defined(__AVX2__)
constexpr int simd_width = 8;
#else
constexpr int simd_width = 4;
#endif

typedef float FloatVec __attribute__((vector_size(4 * simd_width)));
typedef int32_t IntVec __attribute__((vector_size(4 * simd_width)));
typedef uint32_t UintVec __attribute__((vector_size(4 * simd_width)));
typedef uint64_t WideVec __attribute__((vector_size(4 * simd_width)));  // half as many lanes
typedef uint16_t HalfBits __attribute__((vector_size(2 * simd_width)));

inline FloatVec broadcast(float x) { return x - FloatVec{}; }
inline IntVec broadcast(int32_t x) { return x - IntVec{}; }
inline UintVec broadcast(uint32_t x) { return x - UintVec{}; }
inline WideVec broadcast(uint64_t x) { return x - WideVec{}; }

template <typename Vec, typename T>
inline Vec load_unaligned(const T* p) {
  static_assert(sizeof(Vec) % sizeof(T) == 0, "a vector holds whole elements");
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename Vec, typename T>
inline void store_unaligned(T* p, Vec v) {
  std::memcpy(p, &v, sizeof v);
}

inline FloatVec select(IntVec mask, FloatVec a, FloatVec b) { return mask ? a : b; }
inline IntVec select(IntVec mask, IntVec a, IntVec b) { return mask ? a : b; }

// Lane i of a where bit first + i of the word is set, else of b.
inline FloatVec select_bits(uint32_t word, int first, FloatVec a, FloatVec b) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_mask_blend_ps(static_cast<__mmask16>(word >> first), (__m512)b, (__m512)a);
#elif defined(__AVX2__)
  // The lanes' sign bits decide.
  const IntVec shift = broadcast(31 - first) - IntVec{0, 1, 2, 3, 4, 5, 6, 7};
  const __m256i bits = _mm256_sllv_epi32((__m256i)broadcast(word), (__m256i)shift);
  return (FloatVec)_mm256_blendv_ps((__m256)b, (__m256)a, _mm256_castsi256_ps(bits));
#else
  return select((IntVec)((broadcast(word >> first) & UintVec{1, 2, 4, 8}) != 0u), a, b);
#endif
}

// The larger of each pair; b where one is NaN.
inline FloatVec max(FloatVec a, FloatVec b) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (FloatVec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// The smaller of each pair; b where one is NaN.
inline FloatVec min(FloatVec a, FloatVec b) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (FloatVec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// Bit i is set iff lane i of the mask is.
inline uint32_t mask_bits(IntVec mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < simd_width; ++i) bits |= (mask[i] & 1u) << i;
  return bits;
#endif
}
inline bool any(IntVec mask) { return mask_bits(mask) != 0; }

// Lanes where a or b is NaN.
inline IntVec unordered(FloatVec a, FloatVec b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (IntVec)_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q);
#elif defined(__SSE2__) && !defined(__AVX512F__)
  return (IntVec)_mm_cmpunord_ps((__m128)a, (__m128)b);
#else
  return (IntVec)(a != a) | (IntVec)(b != b);
#endif
}

inline float reduce_max(FloatVec v) {
  float best = v[0];
  for (int i = 1; i < simd_width; ++i) best = v[i] > best ? v[i] : best;
  return best;
}
inline float reduce_sum(FloatVec v) {
  float sum = 0.0f;
  for (int i = 0; i < simd_width; ++i) sum += v[i];
  return sum;
}

// Products of the low 32 bits of each 64-bit lane.
inline WideVec multiply_low_halves(WideVec a, WideVec b) {
#if defined(__AVX512F__)
  return (WideVec)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (WideVec)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (WideVec)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// ---- Loads and stores of the three float types, as float32.

inline float to_float(float x) { return x; }
inline float to_float(Bfloat16 x) {
  return Lanes<float>::from_bits(static_cast<int32_t>(static_cast<uint32_t>(x.bits) << 16));
}
inline float to_float(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7FFFu, sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  if (magnitude >= 0x7C00u) {
    return Lanes<float>::from_bits(static_cast<int32_t>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13));
  }
  // The product scales the exponent and makes subnormals exact in one step.
  const float scaled = Lanes<float>::from_bits(static_cast<int32_t>(magnitude << 13)) * 5.192296858534828e33f;  // 2^112
  return Lanes<float>::from_bits(Lanes<float>::bits(scaled) | static_cast<int32_t>(sign));
}

inline FloatVec load(const float* p) { return load_unaligned<FloatVec>(p); }
inline FloatVec load(const Bfloat16* p) {
#if defined(__AVX512F__)
  return (FloatVec)((UintVec)_mm512_cvtepu16_epi32(load_unaligned<__m256i>(p)) << 16);
#elif defined(__AVX2__)
  return (FloatVec)((UintVec)_mm256_cvtepu16_epi32(load_unaligned<__m128i>(p)) << 16);
#else
  return (FloatVec)(__builtin_convertvector(load_unaligned<HalfBits>(p), UintVec) << 16);
#endif
}
inline FloatVec load(const Float16* p) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_cvtph_ps(load_unaligned<__m256i>(p));
#elif defined(__F16C__)
  return (FloatVec)_mm256_cvtph_ps(load_unaligned<__m128i>(p));
#else
  const UintVec bits = __builtin_convertvector(load_unaligned<HalfBits>(p), UintVec);
  const UintVec magnitude = bits & 0x7FFFu, sign = (bits & 0x8000u) << 16;
  const FloatVec scaled = (FloatVec)(magnitude << 13) * broadcast(5.192296858534828e33f);  // 2^112
  const IntVec special = (IntVec)(magnitude >= 0x7C00u);
  const IntVec value = select(special, (IntVec)((magnitude << 13) | 0x7F800000u), (IntVec)scaled);
  return (FloatVec)(value | (IntVec)sign);
#endif
}

// Round to nearest, ties to even; NaN stays NaN.
inline void store(float* p, float x) { *p = x; }
inline void store(Bfloat16* p, float x) {
  const uint32_t bits = static_cast<uint32_t>(Lanes<float>::bits(x));
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  p->bits = static_cast<uint16_t>(nan ? 0x7FC0u : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
inline void store(Float16* p, float x) {
  const uint32_t bits = static_cast<uint32_t>(Lanes<float>::bits(x));
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {  // 65520 and above round to infinity
    half = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded value in the low bits
    const float shifted = Lanes<float>::from_bits(static_cast<int32_t>(magnitude)) + 0.5f;
    half = static_cast<uint32_t>(Lanes<float>::bits(shifted)) - 0x3F000000u;
  } else {
    half = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(half | sign);
}

// ---- numerics.h on vectors.

template <>
struct Lanes<FloatVec> {
  using Int = IntVec;
  static FloatVec set(float x) { return broadcast(x); }
  static IntVec bits(FloatVec x) { return (IntVec)x; }
  static FloatVec from_bits(IntVec i) { return (FloatVec)i; }
  static FloatVec to_float(IntVec i) { return __builtin_convertvector(i, FloatVec); }
  static IntVec to_exponent(IntVec i) { return (IntVec)((UintVec)i << 23); }
  static FloatVec select(IntVec mask, FloatVec a, FloatVec b) { return mask ? a : b; }
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

// Vectors rounded to the float types, to nearest with ties to even, and loads and stores of fewer elements than a vector
// has. NaN stays NaN.
#pragma once

#include "core/cpu/simd.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

// v rounded to T, as float32.
template <typename T>
inline FloatVec rounded(FloatVec v);

template <>
inline FloatVec rounded<float>(FloatVec v) {
  return v;
}

template <>
inline FloatVec rounded<Bfloat16>(FloatVec v) {
  const UintVec bits = (UintVec)v;
  const UintVec nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
  return (FloatVec)select(v != v, broadcast(0x7FC00000), (IntVec)nearest);
}

inline HalfBits float16_bits(FloatVec v) {
#if defined(__AVX512F__)
  return (HalfBits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const UintVec bits = (UintVec)v, sign = (bits >> 16) & 0x8000u;
  const IntVec magnitude = (IntVec)(bits & 0x7FFFFFFFu);
  // As store(Float16*, float) in simd.h has it.
  IntVec half = (IntVec)(((UintVec)magnitude + 0xC8000FFFu + (((UintVec)magnitude >> 13) & 1u)) >> 13);
  half = select(magnitude < 0x38800000, (IntVec)((FloatVec)magnitude + 0.5f) - 0x3F000000, half);
  half = select(magnitude >= 0x477FF000, broadcast(0x7C00), half);
  half = select(magnitude > 0x7F800000, broadcast(0x7E00), half);
  return __builtin_convertvector((UintVec)half | sign, HalfBits);
#endif
}

template <>
inline FloatVec rounded<Float16>(FloatVec v) {
  const HalfBits bits = float16_bits(v);
  return load(reinterpret_cast<const Float16*>(&bits));
}

inline void store(float* p, FloatVec v) { store_unaligned(p, v); }
inline void store(Bfloat16* p, FloatVec v) {
  const UintVec high = (UintVec)rounded<Bfloat16>(v) >> 16;
#if defined(__AVX512F__)
  store_unaligned(p, _mm512_cvtepi32_epi16((__m512i)high));
#else
  store_unaligned(p, __builtin_convertvector(high, HalfBits));
#endif
}
inline void store(Float16* p, FloatVec v) { store_unaligned(p, float16_bits(v)); }

// The first `count` elements and then zeros; all of a vector where there are as many.
template <typename T>
inline FloatVec load_up_to(const T* p, int64_t count) {
  if (count >= simd_width) return load(p);
  T part[simd_width] = {};
  std::memcpy(part, p, static_cast<size_t>(count) * sizeof(T));
  return load(part);
}

template <typename T>
inline void store_up_to(T* p, FloatVec v, int64_t count) {
  if (count >= simd_width) return store(p, v);
  T part[simd_width];
  store(part, v);
  std::memcpy(p, part, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

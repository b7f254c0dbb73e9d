// Elements of the three float types as vectors of float32: rounded to their type, stored, and the last ones of a row,
// which fill no vector. So one code serves all of a row, and its end has the bits that it would have elsewhere.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/cpu/simd.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

// ---- Round to nearest, ties to even; NaN stays NaN.

// The bfloat16 in the upper half of each lane, zeros below.
inline UintVec bfloat16_bits(FloatVec x) {
  const UintVec bits = (UintVec)x;
  const UintVec nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
  return (UintVec)select(x != x, broadcast(int32_t{0x7FC00000}), (IntVec)nearest);
}

inline void store(float* p, FloatVec x) { store_unaligned(p, x); }
inline void store(Bfloat16* p, FloatVec x) {
#if defined(__AVX512F__)
  store_unaligned(p, _mm512_cvtepi32_epi16((__m512i)(bfloat16_bits(x) >> 16)));
#else
  store_unaligned(p, __builtin_convertvector(bfloat16_bits(x) >> 16, HalfBits));
#endif
}
inline void store(Float16* p, FloatVec x) {
#if defined(__AVX512F__)
  store_unaligned(p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  store_unaligned(p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  // As the scalar store of simd.h, whose comments say how.
  const UintVec bits = (UintVec)x;
  const UintVec sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  const UintVec shifted = (UintVec)((FloatVec)magnitude + broadcast(0.5f)) - 0x3F000000u;
  UintVec half = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;
  half = magnitude < 0x38800000u ? shifted : half;
  half = magnitude >= 0x477FF000u ? broadcast(uint32_t{0x7C00}) : half;
  half = magnitude > 0x7F800000u ? broadcast(uint32_t{0x7E00}) : half;
  store_unaligned(p, __builtin_convertvector(half | sign, HalfBits));
#endif
}

// As a T has it.
template <typename T>
inline FloatVec round_to(FloatVec x) {
  T stored[simd_width];
  store(stored, x);
  return load(stored);
}
template <>
inline FloatVec round_to<float>(FloatVec x) {
  return x;
}
template <>
inline FloatVec round_to<Bfloat16>(FloatVec x) {
  return (FloatVec)bfloat16_bits(x);
}

// ---- The first `count` lanes of a vector, fewer than all; the others are 0.

template <typename T>
inline FloatVec load_some(const T* p, int64_t count) {
  T some[simd_width] = {};
  std::memcpy(some, p, static_cast<size_t>(count) * sizeof(T));
  return load(some);
}
template <typename T>
inline void store_some(T* p, FloatVec x, int64_t count) {
  T some[simd_width];
  store(some, x);
  std::memcpy(p, some, static_cast<size_t>(count) * sizeof(T));
}

// The first `count` lanes, all of them where it is more.
template <typename T>
inline FloatVec load_up_to(const T* p, int64_t count) {
  return count >= simd_width ? load(p) : load_some(p, count);
}
template <typename T>
inline void store_up_to(T* p, FloatVec x, int64_t count) {
  if (count >= simd_width) return store(p, x);
  store_some(p, x, count);
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

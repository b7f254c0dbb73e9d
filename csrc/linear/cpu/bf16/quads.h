// Four outputs at a time: how a processor's bfloat16 instructions take weights and inputs, and what they add up.
//
// A Block holds the weights of four outputs, a quad, for eight elements of `in`; an Input the same eight elements of a
// row. add_products adds their products to Sums, which are an output's running float32 sums: one or several to an
// output, always in the same order. Blocks come from wherever weights are kept; what is added to what, and when, is
// decided here alone, so that a row gets the same bits from every kernel.
//
// These instructions count subnormal inputs and results as 0.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/isa.h"
#include "core/storage.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#else
#error "for processors with bfloat16 instructions"
#endif

namespace specbranch {
inline namespace SPECBRANCH_ISA {

constexpr int quad = 4;                      // outputs
constexpr int block_in = 8;                  // elements of `in` in a block
constexpr int block_size = quad * block_in;  // weights

#if defined(__AVX512BF16__)

constexpr int read_in = 16;    // elements that are read at once of a weight's row
constexpr int sums_size = 16;  // floats of a Sums

// Lane 4 o + c holds output o, elements 2 c and 2 c + 1: an output has four sums, each of every fourth pair.
using Block = __m512i;
using Input = __m512i;
using Sums = __m512;

inline Sums no_sums() { return _mm512_setzero_ps(); }
inline Sums load_sums(const float* p) { return _mm512_load_ps(p); }
inline void store_sums(float* p, Sums sums) { _mm512_store_ps(p, sums); }

inline Block no_block() { return _mm512_setzero_si512(); }
inline Block load_block(const Bfloat16* p) { return _mm512_load_si512(p); }
inline void store_block(Bfloat16* p, Block block) { _mm512_store_si512(p, block); }

inline Input load_input(const Bfloat16* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline void add_products(Sums& sums, Block block, Input input) {
  sums = _mm512_dpbf16_ps(sums, (__m512bh)block, (__m512bh)input);
}

// `read_in` elements of each of four rows, as blocks: 4 x 2 parts of 128 bits change places.
inline void read_rows(const Bfloat16* row, int64_t stride, Block (&blocks)[read_in / block_in]) {
  const auto read = [&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i * stride)); };
  const __m512i ab = _mm512_inserti64x4(_mm512_castsi256_si512(read(0)), read(1), 1);
  const __m512i cd = _mm512_inserti64x4(_mm512_castsi256_si512(read(2)), read(3), 1);
  blocks[0] = _mm512_shuffle_i32x4(ab, cd, 0x88);
  blocks[1] = _mm512_shuffle_i32x4(ab, cd, 0xDD);
}

// The four outputs' totals, sums after sums: (0 + 1) + (2 + 3) of an output's. Writes whole vectors: 16 floats for up
// to four sums.
template <int count>
__attribute__((always_inline)) inline void store_totals(const Sums (&sums)[count], float* totals) {
  const auto halves = [](Sums a, Sums b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
  };
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  constexpr int last = count - 1;
#pragma GCC unroll 8
  for (int i = 0; i < count; i += 4) {
    const Sums a = sums[i], b = sums[i + 1 < last ? i + 1 : last];
    const Sums c = sums[i + 2 < last ? i + 2 : last], d = sums[i + 3 < last ? i + 3 : last];
    _mm512_storeu_ps(totals + quad * i, _mm512_permutexvar_ps(order, halves(halves(a, b), halves(c, d))));
  }
}

// Up to 16 outputs of a row: totals plus bias (null for none), rounded to nearest, ties to even.
inline void store_outputs(Bfloat16* to, const float* totals, const Bfloat16* bias, int64_t count) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  __m512 y = _mm512_maskz_loadu_ps(mask, totals);
  if (bias != nullptr) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bias));
    y = _mm512_add_ps(y, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
  }
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(y));
}

#else

constexpr int read_in = 8;
constexpr int sums_size = 4;

// Lane o of pairs[c] holds output o, elements 2 c and 2 c + 1: an output has one sum.
struct Block {
  bfloat16x8_t pairs[4];
};
using Input = bfloat16x8_t;
using Sums = float32x4_t;

inline Sums no_sums() { return vdupq_n_f32(0.0f); }
inline Sums load_sums(const float* p) { return vld1q_f32(p); }
inline void store_sums(float* p, Sums sums) { vst1q_f32(p, sums); }

inline const uint16_t* bits_of(const Bfloat16* p) { return reinterpret_cast<const uint16_t*>(p); }
inline uint16_t* bits_of(Bfloat16* p) { return reinterpret_cast<uint16_t*>(p); }

inline Block no_block() {
  const bfloat16x8_t zeros = vreinterpretq_bf16_u16(vdupq_n_u16(0));
  return {{zeros, zeros, zeros, zeros}};
}
inline Block load_block(const Bfloat16* p) {
  Block block;
  for (int c = 0; c < 4; ++c) block.pairs[c] = vreinterpretq_bf16_u16(vld1q_u16(bits_of(p + 8 * c)));
  return block;
}
inline void store_block(Bfloat16* p, const Block& block) {
  for (int c = 0; c < 4; ++c) vst1q_u16(bits_of(p + 8 * c), vreinterpretq_u16_bf16(block.pairs[c]));
}

inline Input load_input(const Bfloat16* p) { return vreinterpretq_bf16_u16(vld1q_u16(bits_of(p))); }

inline void add_products(Sums& sums, const Block& block, Input input) {
  sums = vbfdotq_laneq_f32(sums, block.pairs[0], input, 0);
  sums = vbfdotq_laneq_f32(sums, block.pairs[1], input, 1);
  sums = vbfdotq_laneq_f32(sums, block.pairs[2], input, 2);
  sums = vbfdotq_laneq_f32(sums, block.pairs[3], input, 3);
}

// `read_in` elements of each of four rows, as a block: 4 x 4 pairs change places.
inline void read_rows(const Bfloat16* row, int64_t stride, Block (&blocks)[read_in / block_in]) {
  const auto read = [&](int i) { return vreinterpretq_u32_u16(vld1q_u16(bits_of(row + i * stride))); };
  const auto joined = [](uint32x4_t a, uint32x4_t b, bool second) {
    const uint64x2_t x = vreinterpretq_u64_u32(a), y = vreinterpretq_u64_u32(b);
    return vreinterpretq_bf16_u64(second ? vtrn2q_u64(x, y) : vtrn1q_u64(x, y));
  };
  const uint32x4_t a = read(0), b = read(1), c = read(2), d = read(3);
  const uint32x4_t ab_even = vtrn1q_u32(a, b), cd_even = vtrn1q_u32(c, d);
  const uint32x4_t ab_odd = vtrn2q_u32(a, b), cd_odd = vtrn2q_u32(c, d);
  blocks[0].pairs[0] = joined(ab_even, cd_even, false);
  blocks[0].pairs[1] = joined(ab_odd, cd_odd, false);
  blocks[0].pairs[2] = joined(ab_even, cd_even, true);
  blocks[0].pairs[3] = joined(ab_odd, cd_odd, true);
}

// The four outputs' totals, sums after sums.
template <int count>
__attribute__((always_inline)) inline void store_totals(const Sums (&sums)[count], float* totals) {
  for (int i = 0; i < count; ++i) vst1q_f32(totals + quad * i, sums[i]);
}

// Outputs of a row: totals plus bias (null for none), rounded to nearest, ties to even.
inline void store_outputs(Bfloat16* to, const float* totals, const Bfloat16* bias, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    float y = totals[i];
    if (bias != nullptr) y += vcvtah_f32_bf16(vreinterpret_bf16_u16(vdup_n_u16(bias[i].bits))[0]);
    const bfloat16_t rounded = vcvth_bf16_f32(y);
    memcpy(to + i, &rounded, sizeof rounded);
  }
}

#endif

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

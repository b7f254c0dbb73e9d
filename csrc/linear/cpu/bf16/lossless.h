// Weights in 12 bits (linear/lossless.h), decoded in registers to the blocks that Dense reads.
#pragma once

#include "linear/cpu/bf16/ahead.h"
#include "linear/cpu/bf16/quads.h"
#include "linear/lossless.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

#if defined(__AVX512BF16__)

struct LosslessWeights {
  static_assert(read_in == Lossless::half && quad == Lossless::quad_outputs,
                "a read is half a run of each output of a quad");

  const uint8_t* data;  // aligned to cache lines
  Lossless layout;
  int64_t quad_bytes = layout.quad_bytes();

  void read(int64_t o, int64_t k, Block (&blocks)[read_in / block_in]) const {
    if (__builtin_expect(o >= layout.out, 0)) {
      for (Block& block : blocks) block = no_block();
      return;
    }
    const uint8_t* const page = page_of(o, k);
    const int64_t place = line_number(k);
    const uint8_t* const line = page + Lossless::tops_bytes + place * Lossless::line_bytes;
    const bool second = k % Lossless::run != 0;
    uint32_t tops;
    memcpy(&tops, page + place * quad, sizeof tops);
    // Lane o of 16 bytes: output o's largest exponent. Less its code it is a weight's exponent, but for zeros.
    const __m512i each =
        _mm512_set_epi32(0x03030303, 0x03030303, 0x03030303, 0x03030303, 0x02020202, 0x02020202, 0x02020202, 0x02020202,
                         0x01010101, 0x01010101, 0x01010101, 0x01010101, 0, 0, 0, 0);
    const __m512i top = _mm512_shuffle_epi8(_mm512_set1_epi32(static_cast<int>(tops)), each);
    const __m512i both = _mm512_load_si512(line + Lossless::codes_offset);
    const __m512i codes = _mm512_and_si512(second ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
    const __mmask64 nonzero = _mm512_cmpneq_epi8_mask(codes, _mm512_set1_epi8(Lossless::zero_code));
    const __m512i exponents = _mm512_maskz_sub_epi8(nonzero, top, codes);
    // Exponent, mantissa, sign: one rotation away from bfloat16.
    const __m512i parts = _mm512_load_si512(line + (second ? Lossless::half * quad : 0));
    const __m512i low = _mm512_unpacklo_epi8(parts, exponents), high = _mm512_unpackhi_epi8(parts, exponents);
    blocks[0] = _mm512_shrdi_epi16(low, low, 1);
    blocks[1] = _mm512_shrdi_epi16(high, high, 1);
    if (__builtin_expect((tops & 0x80808080u) != 0, 0)) {
      for (int j = 0; j < read_in / block_in; ++j) blocks[j] = with_raw(blocks[j], tops, line, j + (second ? 2 : 0));
    }
  }

  __attribute__((always_inline)) void fetch(int64_t o, int64_t k) const {
    const uint8_t* const line = page_of(o, k) + Lossless::tops_bytes + line_number(k) * Lossless::line_bytes;
    for (int64_t i = 0; i < Lossless::line_bytes; i += cache_line) __builtin_prefetch(line + i);
  }

  Ahead ahead(int64_t o, int64_t outputs, int64_t k, int64_t k_end) const {
    const int64_t first = k / Lossless::run, last = divide_up(k_end, Lossless::run);
    const int64_t pages = divide_up(last, Lossless::page_lines) - first / Lossless::page_lines;
    const int64_t bytes = (last - first) * Lossless::line_bytes + pages * Lossless::tops_bytes;
    return {reinterpret_cast<const char*>(page_of(o, k)), quad_bytes, bytes / cache_line, divide_up(outputs, quad)};
  }

 private:
  static int64_t page_number(int64_t k) {
    return static_cast<int64_t>(static_cast<uint64_t>(k) / (Lossless::run * Lossless::page_lines));
  }
  static int64_t line_number(int64_t k) {
    return static_cast<int64_t>(static_cast<uint64_t>(k) / Lossless::run % Lossless::page_lines);
  }
  const uint8_t* page_of(int64_t o, int64_t k) const {
    return data + static_cast<int64_t>(static_cast<uint64_t>(o) / quad) * quad_bytes +
           page_number(k) * Lossless::page_bytes;
  }

  // The j-th block of a line, with the raw runs that it has. Not inlined, and by value: blocks stay in registers.
  __attribute__((noinline)) Block with_raw(Block block, uint32_t tops, const uint8_t* line, int j) const {
    for (int i = 0; i < quad; ++i) {
      if ((tops >> 8 * i & 255) != Lossless::raw_top) continue;
      uint32_t distance;
      memcpy(&distance, line + i * Lossless::half, sizeof distance);
      const uint8_t* const raw = line + distance * Lossless::raw_bytes;
      const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(raw + 16 * j));
      block = _mm512_mask_broadcast_i32x4(block, static_cast<__mmask16>(0xF << 4 * i), eight);
    }
    return block;
  }
};

#endif

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

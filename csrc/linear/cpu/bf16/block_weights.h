// Blocks of weights in the exact arithmetic, decoded in registers to the bfloat16 values that `linear` would read: four
// outputs and 32 elements of `in` at a time, as the four Blocks that Dense has for them.
#pragma once

#include "core/bits.h"
#include "linear/cpu/bf16/ahead.h"
#include "linear/cpu/bf16/quads.h"
#include "linear/packed_blocks.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

#if defined(__AVX512BF16__)

// Four outputs' weights of one run.
template <WeightFormat format>
struct QuadDecoder {
  using Layout = PackedBlocks<format, quad>;
  static constexpr BlockFormat blocks = Layout::format;
  static constexpr int page_runs = 8, halves = Layout::halves;
  static constexpr int64_t page_bytes = Layout::head_bytes * page_runs / Layout::block_runs;  // of its heads

  // Of up to eight runs: each one's scales [half, output], then its minima [output], where it has some.
  struct Page {
    static constexpr int run_numbers = (halves + (blocks.minimum ? 1 : 0)) * quad;
    alignas(64) float numbers[page_runs * run_numbers];

    const float* scales(int64_t i, int h) const { return numbers + run_numbers * i + (halves == 2 ? quad * h : 0); }
    // 0 stands for none.
    const float* minima(int64_t i) const {
      alignas(16) static constexpr float none[quad] = {};
      return blocks.minimum ? numbers + run_numbers * i + halves * quad : none;
    }
  };

  // Of the runs from `first` on, the first of a page. heads: of all runs. What lies behind the last one's is read along
  // and not used.
  __attribute__((always_inline)) static void read_page(const uint8_t* heads, int64_t first, Page& page) {
    const uint8_t* const head = heads + first / page_runs * page_bytes;
    if constexpr (blocks.nested()) {
      const auto of_quad = [&](int64_t offset) {
        __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(head + offset));
        return _mm512_broadcast_f32x4(_mm_cvtph_ps(bits));
      };
      __m512 unit = of_quad(0);
      if constexpr (blocks.minimum) unit = _mm512_mask_blend_ps(0xF0F0, unit, of_quad(2 * quad));
      const auto* const bytes = reinterpret_cast<const __m128i*>(head + Layout::d_bytes);
      for (int i = 0; i < Page::run_numbers * page_runs / 16; ++i) {
        const __m128i scales = _mm_loadu_si128(bytes + i);
        const __m512i wide = blocks.minimum ? _mm512_cvtepu8_epi32(scales) : _mm512_cvtepi8_epi32(scales);
        _mm512_store_ps(page.numbers + 16 * i, _mm512_mul_ps(unit, _mm512_cvtepi32_ps(wide)));
      }
    } else {
      for (int i = 0; i < Page::run_numbers * page_runs / 16; ++i) {
        const __m256i halves_of_floats = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(head) + i);
        _mm512_store_ps(page.numbers + 16 * i, _mm512_cvtph_ps(halves_of_floats));
      }
    }
  }

  // The i-th run of a page, whose codes and tops these are: calls put(number, block) for its four blocks in their order.
  template <typename Put>
  __attribute__((always_inline)) static void decode_blocks(const uint8_t* codes, const uint8_t* tops, int64_t i,
                                                           const Page& page, const Put& put) {
    if constexpr (blocks.bits == 4) {
      const Table table = read_table(page, i);
      const __m512i both = _mm512_load_si512(codes), mask = _mm512_set1_epi8(15);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m512i code = _mm512_and_si512(h == 0 ? both : _mm512_srli_epi16(both, 4), mask);
        const __m512i low = _mm512_shuffle_epi8(table.low, code), high = _mm512_shuffle_epi8(table.high, code);
        put(2 * h, _mm512_unpacklo_epi8(low, high));
        put(2 * h + 1, _mm512_unpackhi_epi8(low, high));
      }
    } else {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m512 scale[2] = {of_two(page.scales(i, h), 0), of_two(page.scales(i, h), 1)};
        const __m512 minimum[2] = {of_two(page.minima(i), 0), of_two(page.minima(i), 1)};
        const __m512i code = read_codes(codes, tops, h), two_23 = _mm512_set1_epi16(0x4B00);
        const __m512i zeros = _mm512_setzero_si512();
        const __m512i low = _mm512_unpacklo_epi8(code, zeros), high = _mm512_unpackhi_epi8(code, zeros);
        const __m512 a = weights(_mm512_unpacklo_epi16(low, two_23), scale[0], minimum[0]),
                     b = weights(_mm512_unpackhi_epi16(low, two_23), scale[1], minimum[1]);
        const __m512 c = weights(_mm512_unpacklo_epi16(high, two_23), scale[0], minimum[0]),
                     d = weights(_mm512_unpackhi_epi16(high, two_23), scale[1], minimum[1]);
        put(2 * h, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        put(2 * h + 1, (__m512i)_mm512_cvtne2ps_pbh(d, c));
      }
    }
  }

  // The same run: writes its four outputs' 32 elements each, one row behind the other, aligned to cache lines.
  __attribute__((always_inline)) static void decode_rows(const uint8_t* codes, const uint8_t* tops, int64_t i,
                                                         const Page& page, Bfloat16* rows) {
    if constexpr (blocks.bits == 4) {  // whose weights are looked up, of all four outputs at once
      decode_blocks(codes, tops, i, page, [&](int number, Block block) {
        auto* const to = reinterpret_cast<__m128i*>(rows + number * block_in);
        constexpr int row = run_size * sizeof(Bfloat16) / sizeof(__m128i);
        _mm_store_si128(to, _mm512_castsi512_si128(block));
        _mm_store_si128(to + row, _mm512_extracti32x4_epi32(block, 1));
        _mm_store_si128(to + 2 * row, _mm512_extracti32x4_epi32(block, 2));
        _mm_store_si128(to + 3 * row, _mm512_extracti32x4_epi32(block, 3));
      });
    } else {
      const __m512i code[2] = {read_codes(codes, tops, 0), read_codes(codes, tops, 1)};
#pragma GCC unroll 4
      for (int o = 0; o < quad; ++o) {
        // Where Layout has its codes: the same bytes of both halves' registers, each the lowest of a word.
        const __m512i place =
            _mm512_add_epi32(_mm512_load_si512(places_of_output.bytes), _mm512_set1_epi32(o % 2 * 32 + o / 2 * 4));
        const auto half = [&](int h) {
          const __m512i words =
              _mm512_mask_permutexvar_epi8(_mm512_set1_epi32(0x4B000000), 0x1111111111111111, place, code[h]);
          return weights(words, _mm512_set1_ps(page.scales(i, h)[o]), _mm512_set1_ps(page.minima(i)[o]));
        };
        _mm512_store_si512(rows + o * run_size, (__m512i)_mm512_cvtne2ps_pbh(half(1), half(0)));
      }
    }
  }

 private:
  // count: codes less the zero. Products are exact, so that a fused subtraction rounds as one of its own.
  __attribute__((always_inline)) static __m512 scaled(__m512 count, __m512 scale, __m512 minimum) {
    if constexpr (blocks.minimum) return _mm512_fmsub_ps(count, scale, minimum);
    return _mm512_mul_ps(count, scale);
  }

  // The weights of words whose lowest byte is a code, and which are the float32 2^23 + code.
  __attribute__((always_inline)) static __m512 weights(__m512i words, __m512 scale, __m512 minimum) {
    const __m512 zero = _mm512_set1_ps(8388608.0f + blocks.zero);
    return scaled(_mm512_sub_ps(_mm512_castsi512_ps(words), zero), scale, minimum);
  }

  // The places of output 0's codes of half a run of 5 bits or more, in the lowest byte of 16 words.
  struct Places {
    alignas(64) uint8_t bytes[64] = {};
    constexpr Places() {
      for (int e = 0; e < half_run; ++e) bytes[4 * e] = static_cast<uint8_t>(e % 8 / 4 * 16 + e / 8 * 8 + e % 4);
    }
  };
  static constexpr Places places_of_output{};

  // A run's codes of one half, a byte each.
  __attribute__((always_inline)) static __m512i read_codes(const uint8_t* codes, const uint8_t* tops, int h) {
    if constexpr (blocks.bits == 8) return _mm512_load_si512(codes + 64 * h);
    const __m512i both = _mm512_load_si512(codes);
    const __m512i low = _mm512_and_si512(h == 0 ? both : _mm512_srli_epi16(both, 4), _mm512_set1_epi8(15));
    if constexpr (blocks.bits == 5) {
      uint64_t bits;
      memcpy(&bits, tops + 8 * h, sizeof bits);
      return _mm512_mask_add_epi8(low, bits, low, _mm512_set1_epi8(16));
    }
    const __m512i two = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tops)));
    const __m512i moved = h == 0 ? _mm512_sllv_epi64(two, _mm512_set_epi64(2, 2, 2, 2, 4, 4, 4, 4))
                                 : _mm512_srlv_epi64(two, _mm512_set_epi64(2, 2, 2, 2, 0, 0, 0, 0));
    return _mm512_or_si512(low, _mm512_and_si512(moved, _mm512_set1_epi8(48)));
  }

  // The numbers of outputs 0 and 1 (or of 2 and 3), each eight times, of four.
  __attribute__((always_inline)) static __m512 of_two(const float* four, int second) {
    const __m512 all = _mm512_broadcast_f32x4(_mm_load_ps(four));
    const __m512i first = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_permutexvar_ps(second == 0 ? first : _mm512_add_epi32(first, _mm512_set1_epi32(2)), all);
  }

  // The 16 weights that codes of 4 bits stand for, of output o and of the one behind it.
  __attribute__((always_inline)) static __m512i weights_of_codes(const Page& page, int64_t i, int o) {
    const __m512 count = _mm512_sub_ps(_mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                       _mm512_set1_ps(static_cast<float>(blocks.zero)));
    const auto of_output = [&](int output) {
      return scaled(count, _mm512_set1_ps(page.scales(i, 0)[output]), _mm512_set1_ps(page.minima(i)[output]));
    };
    return (__m512i)_mm512_cvtne2ps_pbh(of_output(o + 1), of_output(o));
  }

  // Of each output in 16 bytes: their lower and upper bytes.
  struct Table {
    __m512i low, high;
  };
  __attribute__((always_inline)) static Table read_table(const Page& page, int64_t i) {
    const __m512i a = weights_of_codes(page, i, 0), b = weights_of_codes(page, i, 2);
    const __m512i even =
        _mm512_set_epi8(126, 124, 122, 120, 118, 116, 114, 112, 110, 108, 106, 104, 102, 100, 98, 96, 94, 92, 90, 88,
                        86, 84, 82, 80, 78, 76, 74, 72, 70, 68, 66, 64, 62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40,
                        38, 36, 34, 32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return {_mm512_permutex2var_epi8(a, even, b),
            _mm512_permutex2var_epi8(a, _mm512_or_si512(even, _mm512_set1_epi8(1)), b)};
  }
};

// A weight in blocks, by its quads; fetch and ahead as Dense has them.
template <WeightFormat kind>
struct BlockWeights {
  static constexpr WeightFormat format = kind;
  using Decoder = QuadDecoder<kind>;
  using Layout = typename Decoder::Layout;

  const uint8_t* data;  // aligned to cache lines
  Layout layout;
  int64_t group_bytes = layout.group_bytes(), tops_at = layout.tops_offset(), codes_at = layout.codes_offset();

  // The quad at output o begins with its heads.
  const uint8_t* group(int64_t o) const { return data + o / quad * group_bytes; }
  // Of run n of a quad.
  const uint8_t* codes(const uint8_t* group, int64_t n) const { return group + codes_at + n * Layout::codes_bytes; }
  const uint8_t* tops(const uint8_t* group, int64_t n) const { return group + tops_at + n * Layout::tops_bytes; }

  // Asks for what is decoded at output o and element k, and at the first run of a page for all of its heads. Any o and
  // k: a prefetch never fails.
  __attribute__((always_inline)) void fetch(int64_t o, int64_t k) const {
    const uint8_t* const from = group(o);
    const int64_t n = k / run_size;
    for (int64_t i = 0; i < Layout::codes_bytes; i += cache_line) __builtin_prefetch(codes(from, n) + i);
    if constexpr (Layout::tops_bytes > 0) __builtin_prefetch(tops(from, n));
    if (n % Decoder::page_runs == 0) {
      for (int64_t i = 0; i < Decoder::page_bytes; i += cache_line) {
        __builtin_prefetch(from + n / Decoder::page_runs * Decoder::page_bytes + i);
      }
    }
  }

  // Those of the elements [k, k_end) of `outputs` outputs from o on.
  Ahead ahead(int64_t o, int64_t outputs, int64_t k, int64_t k_end) const {
    return {reinterpret_cast<const char*>(codes(group(o), k / run_size)), group_bytes,
            (k_end - k) / run_size * Layout::codes_bytes / cache_line, divide_up(outputs, quad)};
  }
};

#endif

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

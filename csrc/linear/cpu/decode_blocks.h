// Blocks in the layout of the exact arithmetic, decoded to rows of bfloat16 values, a vector at a time.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "core/cpu/simd.h"
#include "linear/packed_blocks.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

template <WeightFormat kind>
class BlockDecoder {
 public:
  static constexpr int outputs = width_of(Arithmetic::exact);  // of a group, which are decoded together
  using Layout = PackedBlocks<kind, outputs>;

  explicit BlockDecoder(const Layout& layout) : layout_(layout) {}

  // The weights of `outputs` outputs from `output` on, which begins a group, to rows `stride` apart.
  void operator()(const uint8_t* data, int64_t output, Bfloat16* to, int64_t stride) const {
    const uint8_t* const group = data + output / outputs * layout_.group_bytes();
    const uint8_t* codes = group + layout_.codes_offset();
    const uint8_t* tops = group + layout_.tops_offset();
    const uint8_t* head = group;
    for (int64_t n = 0; n < layout_.runs(); n += Layout::block_runs) {
      alignas(64) float units[scales_size], scales[scales_size];
      read_units(head, units);
      const uint8_t* numbers = head + Layout::d_bytes;
      for (int i = 0; i < Layout::block_runs; ++i) {
        if (format.nested()) read_scales(units, numbers, scales);
        for (int j = 0; j < Layout::codes_bytes; j += Layout::line) __builtin_prefetch(codes + ahead + j);
        run(codes, tops, format.nested() ? scales : units, to, stride);
        numbers += Layout::scales_bytes;
        codes += Layout::codes_bytes;
        tops += Layout::tops_bytes;
        to += run_size;
      }
      head += Layout::head_bytes;
    }
  }

 private:
  static constexpr BlockFormat format = Layout::format;
  static constexpr int halves = Layout::halves, lanes = simd_width;
  static constexpr int64_t ahead = 2048;                     // bytes: groups lie one behind the other
  static constexpr int minima = halves * outputs;            // where they begin behind scales [half, output]
  static constexpr int scales_size = lanes < 8 ? 8 : lanes;  // of both, in whole vectors
  static constexpr int parts = half_run / lanes;             // vectors of half a run
  static_assert(outputs == 4 && half_run % lanes == 0, "a half of a run is whole vectors");

  // Lanes of a vector of bytes, and of codes that are still integers.
  static IntVec widen(const uint8_t* p) {
#if defined(__AVX512F__)
    return (IntVec)_mm512_cvtepu8_epi32(load_unaligned<__m128i>(p));
#elif defined(__AVX2__)
    return (IntVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    typedef uint8_t Bytes __attribute__((vector_size(lanes)));
    return __builtin_convertvector(load_unaligned<Bytes>(p), IntVec);
#endif
  }

  // What lies behind the numbers of a head, or of a run, is read along and not used.

  // d of each scale, dmin of each minimum.
  static void read_units(const uint8_t* head, float* units) {
    const auto* const from = reinterpret_cast<const Float16*>(head);
    for (int i = 0; i < scales_size; i += lanes) store_unaligned(units + i, load(from + i));
    if constexpr (halves == 2) memcpy(units + outputs, units, outputs * sizeof(float));
  }

  static void read_scales(const float* units, const uint8_t* numbers, float* scales) {
    for (int i = 0; i < scales_size; i += lanes) {
      IntVec number = widen(numbers + i);
      if constexpr (!format.minimum) number = (number ^ 128) - 128;  // they are signed
      store_unaligned(scales + i, __builtin_convertvector(number, FloatVec) * load(units + i));
    }
  }

  // Four outputs' 32 weights each.
  static void run(const uint8_t* codes, const uint8_t* tops, const float* scales, Bfloat16* to, int64_t stride) {
    if constexpr (format.bits == 4) {
      for (int o = 0; o < outputs; ++o) {
        nibbles(codes + o * half_run, scales[o], format.minimum ? scales[minima + o] : 0.0f, to + o * stride);
      }
    } else {
      // 16 bytes have elements [4 q, 4 q + 4) of outputs `odd` and `odd` + 2, then [8 + 4 q, 12 + 4 q) of them.
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const float* const of_half = scales + (halves == 2 ? h * outputs : 0);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          const Factors scale = of_pair(of_half, odd);
          const Factors minimum = format.minimum ? of_pair(scales + minima, odd) : Factors{};
          Words words[2];
#pragma GCC unroll 2
          for (int q = 0; q < 2; ++q) {
            IntVec code[parts];
            for (int i = 0; i < parts; ++i) code[i] = read_codes(codes, tops, h, (odd * 2 + q) * half_run + i * lanes);
            words[q] = rounded(code, scale, minimum);
          }
          store_half(to + odd * stride + h * half_run, __builtin_shufflevector(words[0], words[1], 0, 4, 2, 6));
          store_half(to + (odd + 2) * stride + h * half_run, __builtin_shufflevector(words[0], words[1], 1, 5, 3, 7));
        }
      }
    }
  }

  // An output's run in codes of 4 bits: they stand for 16 weights, which are computed and then looked up.
  static void nibbles(const uint8_t* codes, float scale, float minimum, Bfloat16* to) {
    Factors scales, minima;
    for (int i = 0; i < parts; ++i) {
      scales.part[i] = broadcast(scale);
      minima.part[i] = broadcast(minimum);
    }
#if defined(__AVX2__) || defined(__aarch64__)
    alignas(64) static constexpr uint8_t all_codes[half_run] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    IntVec every[parts];
    for (int i = 0; i < parts; ++i) every[i] = widen(all_codes + i * lanes);
    const Words weights = rounded(every, scales, minima);
#endif
#if defined(__AVX2__)
    // In each half of a register the lower bytes of eight weights, then the upper ones.
    const __m256i apart = _mm256_shuffle_epi8(
        (__m256i)weights,
        _mm256_broadcastsi128_si256(_mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0)));
    const __m256i lower = _mm256_permute4x64_epi64(apart, 0x88), upper = _mm256_permute4x64_epi64(apart, 0xDD);
    const __m256i twice = _mm256_broadcastsi128_si256(load_unaligned<__m128i>(codes));
    const __m256i code =
        _mm256_and_si256(_mm256_srlv_epi64(twice, _mm256_set_epi64x(4, 4, 0, 0)), _mm256_set1_epi8(15));
    const __m256i a = _mm256_shuffle_epi8(lower, code), b = _mm256_shuffle_epi8(upper, code);
    const __m256i first = _mm256_unpacklo_epi8(a, b), second = _mm256_unpackhi_epi8(a, b);
    store_half(to, (Words)_mm256_permute2x128_si256(first, second, 0x20));
    store_half(to + half_run, (Words)_mm256_permute2x128_si256(first, second, 0x31));
#elif defined(__aarch64__)
    uint8x16_t halves_of_weights[2];
    memcpy(halves_of_weights, &weights, sizeof weights);
    const uint8x16_t lower = vuzp1q_u8(halves_of_weights[0], halves_of_weights[1]);
    const uint8x16_t upper = vuzp2q_u8(halves_of_weights[0], halves_of_weights[1]);
    const uint8x16_t both = vld1q_u8(codes);
    for (int h = 0; h < 2; ++h) {
      const uint8x16_t code = h == 0 ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4);
      const uint8x16_t a = vqtbl1q_u8(lower, code), b = vqtbl1q_u8(upper, code);
      store_unaligned(to + h * half_run, vzip1q_u8(a, b));
      store_unaligned(to + h * half_run + half_run / 2, vzip2q_u8(a, b));
    }
#else
    IntVec low[parts], high[parts];
    for (int i = 0; i < parts; ++i) {
      const IntVec both = widen(codes + i * lanes);
      low[i] = both & 15;
      high[i] = both >> 4;
    }
    store_half(to, rounded(low, scales, minima));
    store_half(to + half_run, rounded(high, scales, minima));
#endif
  }

  // Of half a run's elements.
  struct Factors {
    FloatVec part[parts];
  };

  // Four of output `odd` and four of the one two behind it, in turn.
  static Factors of_pair(const float* four, int odd) {
    Factors f;
    for (int i = 0; i < parts; ++i) {
      IntVec second;
      for (int j = 0; j < lanes; ++j) second[j] = (i * lanes + j) / 4 % 2 == 0 ? 0 : -1;
      f.part[i] = select(second, broadcast(four[odd + 2]), broadcast(four[odd]));
    }
    return f;
  }

  // Codes of half h of a run from `place` on.
  static IntVec read_codes(const uint8_t* codes, const uint8_t* tops, int h, int place) {
    if constexpr (format.bits == 8) return widen(codes + h * 4 * half_run + place);
    const IntVec both = widen(codes + place), low = h == 0 ? both & 15 : both >> 4;
    if constexpr (format.bits == 5) {
      uint16_t bits;
      memcpy(&bits, tops + 8 * h + place / 8, sizeof bits);
      UintVec lane;
      for (int i = 0; i < lanes; ++i) lane[i] = static_cast<uint32_t>(i);
      return low | (IntVec)((broadcast(static_cast<uint32_t>(bits) << 4 >> place % 8) >> lane) & 16u);
    }
    const IntVec two = widen(tops + place % 32) >> (place / 32 * 2 + 4 * h);
    return low | (two & 3) << 4;
  }

  typedef uint64_t Words __attribute__((vector_size(2 * half_run)));  // half a run in bfloat16

  static Words rounded(const IntVec* codes, const Factors& scale, const Factors& minimum) {
    FloatVec weights[parts];
    for (int i = 0; i < parts; ++i) {
      weights[i] = __builtin_convertvector(codes[i] - format.zero, FloatVec) * scale.part[i];
      if constexpr (format.minimum) weights[i] -= minimum.part[i];
    }
#if defined(__AVX512BF16__)
    return (Words)_mm512_cvtneps_pbh((__m512)weights[0]);
#else
    UintVec upper[parts];
    for (int i = 0; i < parts; ++i) {
      const UintVec bits = (UintVec)weights[i];  // none is NaN
      upper[i] = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    }
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepi32_epi16((__m512i)upper[0]);
#elif defined(__AVX2__)
    return (Words)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)upper[0], (__m256i)upper[1]), 0xD8);
#else
    typedef uint16_t Lanes16 __attribute__((vector_size(2 * lanes)));
    Lanes16 words[parts];
    for (int i = 0; i < parts; ++i) words[i] = __builtin_convertvector(upper[i], Lanes16);
    Words all;
    memcpy(&all, words, sizeof all);
    return all;
#endif
#endif
  }

  static void store_half(Bfloat16* to, Words words) { store_unaligned(to, words); }

  Layout layout_;
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

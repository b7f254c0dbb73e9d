// bfloat16 weights in 12 bits and a little, without loss.
//
// The exponents of neighbouring weights differ little. Of each run of 32 weights along `in` a byte holds the largest
// exponent, `top`, and each weight keeps its sign and mantissa in a byte and how far its exponent lies below in 4 bits:
// 0 to 14, or 15 for exponent 0, which zeros have. A run with an exponent further below, or with infinities or NaN, is
// kept raw: its top is `raw_top`. (Gaussian weights: 0.25 % of the runs. Zeros are common in what was quantised once.)
//
// Four outputs, a quad, lie together, so that a 512-bit register decodes all four at once:
//   quad    [pages of 16 lines], padded with zero weights to whole quads and lines
//   page    64 bytes: the tops, [line, output]; then its lines, only the last page may have fewer than 16
//   line    32 elements of `in`, 192 bytes:
//             [2, output, 16]  sign and mantissa of 16 elements, the first and the second half; the mantissa in the
//                              upper 7 bits, the sign in the lowest
//             [output, 16]     exponents: the first half's in the lower 4 bits, the second half's in the upper ones
// Behind all quads lie the raw runs, 64 bytes each; the first four bytes of such a run's signs and mantissas say where, in
// units of 64 bytes from its line on. So quads from any one on are a packed weight too, of fewer outputs.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/bits.h"
#include "core/isa.h"
#include "core/storage.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

struct Lossless {
  static constexpr int quad_outputs = 4, run = 32, half = 16, page_lines = 16;
  static constexpr int64_t tops_bytes = 64, line_bytes = 192, codes_offset = 128, raw_bytes = 64;
  static constexpr int64_t page_bytes = tops_bytes + page_lines * line_bytes;
  static constexpr uint8_t raw_top = 255, zero_code = 15;

  int64_t out, in;

  int64_t lines() const { return divide_up(in, run); }
  int64_t quads() const { return divide_up(out, quad_outputs); }
  int64_t quad_bytes() const { return divide_up(lines(), page_lines) * tops_bytes + lines() * line_bytes; }
  int64_t raw_offset() const { return quads() * quad_bytes(); }

  int64_t top_offset(int64_t output, int64_t line) const {
    return output / quad_outputs * quad_bytes() + line / page_lines * page_bytes + line % page_lines * quad_outputs +
           output % quad_outputs;
  }
  int64_t line_offset(int64_t output, int64_t line) const {
    return output / quad_outputs * quad_bytes() + line / page_lines * page_bytes + tops_bytes +
           line % page_lines * line_bytes;
  }
  // Where a run's half of 16 signs and mantissas lies.
  int64_t half_offset(int64_t output, int64_t line, int which) const {
    return line_offset(output, line) + which * (half * quad_outputs) + output % quad_outputs * half;
  }
  int64_t codes(int64_t output, int64_t line) const {
    return line_offset(output, line) + codes_offset + output % quad_outputs * half;
  }

  static int exponent(Bfloat16 w) { return w.bits >> 7 & 255; }

  // The largest exponent of a run's weights, or raw_top.
  static uint8_t top_of(const Bfloat16* weights, int64_t count) {
    int top = 0, least = 255;
    for (int64_t i = 0; i < count; ++i) {
      const int e = exponent(weights[i]), other = e == 0 ? 255 : e;
      top = e > top ? e : top;
      least = other < least ? other : least;
    }
    return top - least >= zero_code ? raw_top : static_cast<uint8_t>(top);
  }

  // Writes a run of up to 32 weights, zeros behind them. raw: how many raw runs there are so far. Returns whether this
  // is one more.
  bool encode(uint8_t* data, int64_t output, int64_t line, const Bfloat16* weights, int64_t count, int64_t raw) const {
    const uint8_t top = top_of(weights, count);
    data[top_offset(output, line)] = top;
    uint8_t* const halves[2] = {data + half_offset(output, line, 0), data + half_offset(output, line, 1)};
    uint8_t* const code = data + codes(output, line);
    memset(halves[0], 0, half);
    memset(halves[1], 0, half);
    memset(code, top == raw_top ? 0 : 255, half);  // zeros behind the last weight
    if (top == raw_top) {
      const int64_t place = raw_offset() + raw * raw_bytes;
      const uint32_t distance = static_cast<uint32_t>((place - line_offset(output, line)) / raw_bytes);
      memcpy(halves[0], &distance, sizeof distance);
      uint8_t* const to = data + place;
      memset(to, 0, raw_bytes);
      memcpy(to, weights, static_cast<size_t>(count) * sizeof(Bfloat16));
      return true;
    }
    for (int64_t i = 0; i < count; ++i) {
      const unsigned bits = weights[i].bits;
      halves[i / half][i % half] = static_cast<uint8_t>((bits & 127) << 1 | bits >> 15);
      const int e = exponent(weights[i]), below = e == 0 ? zero_code : top - e;
      code[i % half] &= static_cast<uint8_t>(i < half ? 0xF0 | below : 0x0F | below << 4);
    }
    return false;
  }

  // The 32 weights of a run.
  void decode(const uint8_t* data, int64_t output, int64_t line, Bfloat16* weights) const {
    const uint8_t* const halves[2] = {data + half_offset(output, line, 0), data + half_offset(output, line, 1)};
    const unsigned top = data[top_offset(output, line)];
    if (top == raw_top) {
      uint32_t distance;
      memcpy(&distance, halves[0], sizeof distance);
      memcpy(weights, data + line_offset(output, line) + distance * raw_bytes, raw_bytes);
      return;
    }
    const uint8_t* const code = data + codes(output, line);
    for (int i = 0; i < run; ++i) {
      const unsigned part = halves[i / half][i % half], below = code[i % half] >> (i < half ? 0 : 4) & 15;
      const unsigned e = below == zero_code ? 0 : top - below;
      weights[i].bits = static_cast<uint16_t>((part & 1) << 15 | e << 7 | part >> 1);
    }
  }
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

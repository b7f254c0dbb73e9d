// Blocks of weights, packed anew so that whole registers of them meet an input: `width` outputs lie together, a group.
//
//   group    [heads], [tops of every run], [codes of every run], each padded to cache lines
//   head     of a block: d [width] and, where there are minima, dmin [width] in float16; then for each run of 32 its
//            scales [1 or 2, width] and minima [width], a byte each, where blocks have any
//   codes    of a run: a byte each of 8 bits; else the lower 4 bits of the first 16 elements, and above them those of the
//            last 16
//   tops     of a run: the bits above these 4
//
// Four outputs, for the exact arithmetic: a register of codes holds 16 elements of each of them, as a Block of
// cpu/bf16/quads.h has its outputs. Sixteen, for the fast one: four elements of each, which one instruction multiplies
// and adds up.
#pragma once

#include <cstring>

#include "core/bits.h"
#include "core/cpu/simd.h"
#include "core/storage.h"
#include "linear/block_format.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

constexpr int width_of(Arithmetic arithmetic) { return arithmetic == Arithmetic::fast ? 16 : 4; }

constexpr int run_size = 32, half_run = 16;  // weights of an output that lie together
constexpr int most_width = 16;

// 32 weights of an output. scale: of its halves.
struct Run {
  uint8_t codes[run_size];
  Float16 d, dmin;
  uint8_t scale[2], minimum;
};

template <WeightFormat kind, int width_>
struct PackedBlocks {
  static constexpr BlockFormat format = block_format(kind);
  static constexpr int width = width_, run = run_size, half = half_run, line = 64;
  static constexpr int block_runs = format.weights / run;
  static constexpr int halves = run / format.scaled;  // of a run that have a scale each
  static constexpr int64_t d_bytes = 2 * width * (format.minimum ? 2 : 1);
  static constexpr int64_t scales_bytes = format.nested() ? width * (halves + (format.minimum ? 1 : 0)) : 0;
  static constexpr int64_t head_bytes = d_bytes + block_runs * scales_bytes;
  static constexpr int64_t tops_bytes = format.bits == 5 ? width * 4 : format.bits == 6 ? width * 8 : 0;
  static constexpr int64_t codes_bytes = width * (format.bits == 8 ? run : half);

  int64_t out, in;

  int64_t runs() const { return in / run; }
  // Padded with weights of 0, to a whole number of the widest ones.
  int64_t groups() const { return divide_up(out, most_width) * (most_width / width); }
  int64_t tops_offset() const { return whole_lines(in / format.weights * head_bytes); }
  int64_t codes_offset() const { return tops_offset() + whole_lines(runs() * tops_bytes); }
  int64_t group_bytes() const { return codes_offset() + whole_lines(runs() * codes_bytes); }
  int64_t bytes() const { return groups() * group_bytes(); }

  // Writes a run of an output into data of zeros, `bytes()` of them.
  void put(uint8_t* data, int64_t output, int64_t number, const Run& from) const {
    uint8_t* const group = data + output / width * group_bytes();
    const int64_t o = output % width;
    uint8_t* const head = group + number / block_runs * head_bytes;
    memcpy(head + 2 * o, &from.d, sizeof from.d);
    if (format.minimum) memcpy(head + 2 * (width + o), &from.dmin, sizeof from.dmin);
    if (format.nested()) {
      uint8_t* const scales = head + d_bytes + number % block_runs * scales_bytes + o;
      for (int h = 0; h < halves; ++h) scales[h * width] = from.scale[h];
      if (format.minimum) scales[halves * width] = from.minimum;
    }
    uint8_t* const codes = group + codes_offset() + number * codes_bytes;
    uint8_t* const tops = group + tops_offset() + number * tops_bytes;
    for (int e = 0; e < run; ++e) {
      const Place place = place_of(static_cast<int>(o), e);
      const int code = from.codes[e];
      codes[place.codes] |= static_cast<uint8_t>(format.bits == 8 ? code : (code & 15) << place.shift);
      if (format.bits == 5 || format.bits == 6) {
        tops[place.tops] |= static_cast<uint8_t>(code >> 4 << place.tops_shift);
      }
    }
  }

  // The 32 weights of a run, in bfloat16.
  void decode(const uint8_t* data, int64_t output, int64_t number, Bfloat16* weights) const {
    const uint8_t* const group = data + output / width * group_bytes();
    const int64_t o = output % width;
    const uint8_t* const head = group + number / block_runs * head_bytes;
    const uint8_t* const scales = head + d_bytes + number % block_runs * scales_bytes + o;
    const float d = half_float(head + 2 * o);
    float minimum = 0.0f;
    if (format.minimum) minimum = half_float(head + 2 * (width + o));
    if (format.minimum && format.nested()) minimum *= static_cast<float>(scales[halves * width]);
    const uint8_t* const codes = group + codes_offset() + number * codes_bytes;
    const uint8_t* const tops = group + tops_offset() + number * tops_bytes;
    for (int e = 0; e < run; ++e) {
      const Place place = place_of(static_cast<int>(o), e);
      int code = format.bits == 8 ? codes[place.codes] : codes[place.codes] >> place.shift & 15;
      if (format.bits == 5) code |= (tops[place.tops] >> place.tops_shift & 1) << 4;
      if (format.bits == 6) code |= (tops[place.tops] >> place.tops_shift & 3) << 4;
      code -= format.zero;
      float scale = d;
      if (format.nested()) scale *= scale_of(scales[halves == 2 ? e / half * width : 0]);
      store(weights + e, scale * static_cast<float>(code) - minimum);
    }
  }

 private:
  struct Place {
    int codes, shift, tops, tops_shift;
  };

  static constexpr int64_t whole_lines(int64_t bytes) { return divide_up(bytes, line) * line; }
  static float half_float(const uint8_t* p) {
    Float16 half;
    memcpy(&half, p, sizeof half);
    return to_float(half);
  }
  // Those of formats without minima are signed.
  static float scale_of(uint8_t scale) { return format.minimum ? scale : static_cast<int8_t>(scale); }

  // Where an element's code lies among those of its run.
  static constexpr Place place_of(int o, int e) {
    const int h = e / half, i = e % half;
    if (width == 4) {
      // One output's bytes of 4 bits lie together. The others' lie so that unpacking them twice gives words of 32 bits
      // of outputs 0 and 1, elements 0 to 7; then of outputs 2 and 3; then of elements 8 to 15.
      const int natural = o * half + i;
      const int split = (o % 2 * 2 + i % 8 / 4) * 16 + (i / 8 * 2 + o / 2) * 4 + i % 4;
      switch (format.bits) {
        case 4: return {natural, 4 * h, 0, 0};
        case 5: return {split, 4 * h, h * 8 + split / 8, split % 8};
        case 6: return {split, 4 * h, split % 32, split / 32 * 2 + 4 * h};
        default: return {h * 64 + split, 0, 0, 0};
      }
    }
    const int lane = o * 4 + i % 4;
    switch (format.bits) {
      case 4: return {i / 4 * 64 + lane, 4 * h, 0, 0};
      case 5: return {i / 4 * 64 + lane, 4 * h, lane, e / 4};
      case 6: return {i / 4 * 64 + lane, 4 * h, h * 64 + lane, i / 4 * 2};
      default: return {e / 4 * 64 + lane, 0, 0, 0};
    }
  }
};

// Calls body(layout) for a weight of blocks.
template <typename Body>
void with_packed_blocks(WeightFormat format, Arithmetic arithmetic, int64_t out, int64_t in, const Body& body) {
  with_block_format(format, [&](auto kind) {
    if (arithmetic == Arithmetic::fast) {
      body(PackedBlocks<kind, width_of(Arithmetic::fast)>{out, in});
    } else {
      body(PackedBlocks<kind, width_of(Arithmetic::exact)>{out, in});
    }
  });
}
template <typename Body>
void with_packed_blocks(const PackedWeight& weight, const Body& body) {
  with_packed_blocks(weight.format, weight.arithmetic, weight.out, weight.in, body);
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

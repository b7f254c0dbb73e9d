// Blocks of quantised weights, as GGUF files have them: all weights of a block of 32 or 256 along `in` share a scale, d.
// In blocks of 256 every 32 (or 16) weights have a small integer beside it, their scale, and some formats a minimum:
//   weight = (d scale) (code - zero) - dmin minimum     in float32
// In blocks of 32 scale and minimum are 1, and dmin is 0 unless the format has minima.
#pragma once

#include <type_traits>

#include "core/isa.h"
#include "linear/packed_weight.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

struct BlockFormat {
  int bits;      // of a code
  int scaled;    // weights that share a scale
  int weights;   // of a block
  int bytes;     // of a block in a file
  int zero;      // the code of a weight of 0
  bool minimum;  // whether there is one

  constexpr bool nested() const { return weights > scaled; }  // blocks have scales beside d
};

constexpr BlockFormat block_format(WeightFormat format) {
  switch (format) {
    case WeightFormat::q8_0: return {8, 32, 32, 34, 128, false};
    case WeightFormat::q4_0: return {4, 32, 32, 18, 8, false};
    case WeightFormat::q4_1: return {4, 32, 32, 20, 0, true};
    case WeightFormat::q5_1: return {5, 32, 32, 24, 0, true};
    case WeightFormat::q5_0: return {5, 32, 32, 22, 16, false};
    case WeightFormat::q4_k: return {4, 32, 256, 144, 0, true};
    case WeightFormat::q5_k: return {5, 32, 256, 176, 0, true};
    case WeightFormat::q6_k: return {6, 16, 256, 210, 32, false};
    default: return {};
  }
}

// Calls body(format as a type) for a format of blocks.
template <typename Body>
void with_block_format(WeightFormat format, const Body& body) {
  switch (format) {
    case WeightFormat::q8_0: return body(std::integral_constant<WeightFormat, WeightFormat::q8_0>());
    case WeightFormat::q4_0: return body(std::integral_constant<WeightFormat, WeightFormat::q4_0>());
    case WeightFormat::q5_0: return body(std::integral_constant<WeightFormat, WeightFormat::q5_0>());
    case WeightFormat::q4_1: return body(std::integral_constant<WeightFormat, WeightFormat::q4_1>());
    case WeightFormat::q5_1: return body(std::integral_constant<WeightFormat, WeightFormat::q5_1>());
    case WeightFormat::q4_k: return body(std::integral_constant<WeightFormat, WeightFormat::q4_k>());
    case WeightFormat::q5_k: return body(std::integral_constant<WeightFormat, WeightFormat::q5_k>());
    case WeightFormat::q6_k: return body(std::integral_constant<WeightFormat, WeightFormat::q6_k>());
    default: return;
  }
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

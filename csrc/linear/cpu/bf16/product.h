// A product over weights of any kind: a struct with read, fetch and ahead, as Dense has them.
//
// Weights are read once, and what they are multiplied with is chosen so that memory or arithmetic is always busy:
//   - few rows (few.h): the bytes of the weights are the limit. Tiles of outputs go over all of `in`, and ask for the next
//     tile's weights meanwhile.
//   - many rows (many.h): arithmetic is. A tile's weights are packed while its first rows are multiplied, stay in the
//     first-level cache for all others, and the next tile's weights come in little by little.
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/bits.h"
#include "linear/cpu/bf16/ahead.h"
#include "linear/cpu/bf16/quads.h"
#include "linear/cpu/parallel.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

template <typename Weights>
struct Product {
  Weights weights;
  const Bfloat16* input;  // [rows, in]
  const Bfloat16* bias;   // [out] or null
  Bfloat16* output;       // [rows, out], rows `stride` elements apart
  int64_t rows, in, out, stride;

  // Rows from `row` on have their sums, `quads` of them each from output o on; outputs beyond the last are left out.
  template <int count, int quads>
  __attribute__((always_inline)) void finish(const Sums (&sums)[count * quads], int64_t row, int64_t o) const {
    float totals[quad * (divide_up(count * quads, 4) * 4)];
    // A copy: of an array whose elements are taken by number the compiler stores each when it changes.
    Sums last[count * quads];
#pragma GCC unroll 64
    for (int i = 0; i < count * quads; ++i) last[i] = sums[i];
    store_totals(last, totals);
    const int64_t outputs = std::min<int64_t>(quads * quad, out - o);
    for (int r = 0; r < count; ++r) {
      store_outputs(output + (row + r) * stride + o, totals + r * quads * quad, bias == nullptr ? nullptr : bias + o,
                    outputs);
    }
  }
};

template <typename Weights, typename Params>
Product<Weights> product_of(const Weights& weights, const Params& params, int64_t in, int64_t out) {
  return {weights,
          params.input.template as<const Bfloat16>(),
          params.bias.template as<const Bfloat16>(),
          params.output.template as<Bfloat16>(),
          rows_of(params.input),
          in,
          out,
          out};
}

// Rows come in `groups` groups of nearly the same size: the first row of group g.
inline int64_t group_begin(int64_t rows, int64_t groups, int64_t g) { return rows * g / groups; }

// Calls body(product) for all rows, at most `most` of them at once.
template <typename Weights, typename Body>
void for_passes(const Product<Weights>& whole, int64_t most, const Body& body) {
  const int64_t passes = whole.out == 0 ? 0 : divide_up(whole.rows, most);
  for (int64_t i = 0; i < passes; ++i) {
    Product<Weights> p = whole;
    const int64_t row = group_begin(whole.rows, passes, i);
    p.rows = group_begin(whole.rows, passes, i + 1) - row;
    p.input += row * p.in;
    p.output += row * p.stride;
    body(p);
  }
}

// Calls body(rows as a type) for a number of rows, 1 to `most`, known at run time.
template <int most, typename Body>
inline void with_rows(int64_t rows, const Body& body) {
  if constexpr (most > 1) {
    if (rows < most) return with_rows<most - 1>(rows, body);
  }
  body(std::integral_constant<int, most>());
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

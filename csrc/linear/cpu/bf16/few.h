// Few rows: every tile of outputs goes over all of `in` with its sums in registers, and asks for the next one's weights.
#pragma once

#include <atomic>

#include "linear/cpu/bf16/product.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

// The rows of a tile, by its quads: enough Sums to hide a multiplication's latency, few enough that they, the blocks that
// are read at once and an input fit 32 registers.
constexpr int few_group(int quads) { return quads == 4 ? 5 : quads == 3 ? 7 : 14; }
constexpr int most_few = 16;  // rows

// Blocks of `quads` quads from output o and element k on, times the inputs at x.
template <int rows, int quads, typename Weights>
inline void add_read(Sums (&sums)[rows * quads], const Weights& weights, int64_t o, int64_t k, const Bfloat16* x,
                     int64_t x_stride) {
  Block blocks[quads][read_in / block_in];
#pragma GCC unroll 4
  for (int q = 0; q < quads; ++q) weights.read(o + q * quad, k, blocks[q]);
#pragma GCC unroll 2
  for (int j = 0; j < read_in / block_in; ++j) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Input input = load_input(x + r * x_stride + j * block_in);
#pragma GCC unroll 4
      for (int q = 0; q < quads; ++q) add_products(sums[r * quads + q], blocks[q][j], input);
    }
  }
}

// Rows from `row` on, `quads` quads from output o on. edge: all rows' last elements, where `in` is no whole number of
// lines. next: the tile whose weights are asked for meanwhile.
template <int rows, int quads, typename Weights>
__attribute__((noinline)) void few_tile(const Product<Weights>& p, const Bfloat16* edge, int64_t row, int64_t o,
                                        int64_t next) {
  Sums sums[rows * quads];
#pragma GCC unroll 32
  for (Sums& each : sums) each = no_sums();
  const Bfloat16* const x = p.input + row * p.in;
  const int64_t whole = p.in / line_in * line_in;
  for (int64_t k = 0; k < whole; k += line_in) {
#pragma GCC unroll 4
    for (int q = 0; q < quads; ++q) p.weights.fetch(next + q * quad, k);
#pragma GCC unroll 4
    for (int i = 0; i < line_in; i += read_in) add_read<rows, quads>(sums, p.weights, o, k + i, x + k + i, p.in);
  }
  for (int64_t k = whole; k < p.in; k += read_in) {
    add_read<rows, quads>(sums, p.weights, o, k, edge + row * line_in + (k - whole), line_in);
  }
  p.template finish<rows, quads>(sums, row, o);
}

// quads: of a tile. groups: of rows; the second one finds the weights in the caches, and decodes them again.
template <int quads, int groups, typename Weights>
void few_quads(const Product<Weights>& p, int threads) {
  constexpr int width = quads * quad;
  Bfloat16 edge[most_few * line_in];
  if (const int64_t left = p.in % line_in; left > 0) {
    memset(edge, 0, sizeof edge);
    for (int64_t r = 0; r < p.rows; ++r) {
      memcpy(edge + r * line_in, p.input + (r + 1) * p.in - left, static_cast<size_t>(left) * sizeof(Bfloat16));
    }
  }
  // Long panels read memory in long runs, short ones keep the threads busy to the end. They are handed out one by one,
  // since the draft may be running on one of the cores, and one ahead, since a tile asks for the next one's weights.
  const int64_t tiles = std::max<int64_t>(1, std::min<int64_t>(6, p.out / (32 * threads * width)));
  const int64_t panel = tiles * width;
  std::atomic<int64_t> next_panel{0};
#pragma omp parallel num_threads(threads)
  {
    int64_t begin = next_panel++ * panel;
    while (begin < p.out) {
      const int64_t following = next_panel++ * panel, end = std::min(begin + panel, p.out);
      for (int64_t o = begin; o < end;) {
        const bool whole = o + width <= end;
        const int64_t after = o + (whole ? width : quad), next = after < end ? after : following;
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t row = group_begin(p.rows, groups, g);
          with_rows<few_group(quads)>(group_begin(p.rows, groups, g + 1) - row, [&](auto rows) {
            if (whole) {
              few_tile<rows, quads>(p, edge, row, o, g == 0 ? next : o);
            } else {
              few_tile<rows, 1>(p, edge, row, o, g == 0 ? next : o);
            }
          });
        }
        o = after;
      }
      begin = following;
    }
  }
}

template <typename Weights>
void few(const Product<Weights>& p, int threads) {
  if (p.rows <= few_group(4)) {
    few_quads<4, 1>(p, threads);
  } else if (p.rows <= few_group(3)) {
    few_quads<3, 1>(p, threads);
  } else if (p.rows <= few_group(2)) {
    few_quads<2, 1>(p, threads);
  } else {
    few_quads<2, 2>(p, threads);
  }
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

// Many rows: a tile of weights, packed once, meets all rows while it is in the first-level cache.
#pragma once

#include <atomic>

#include "core/cpu/memory.h"
#include "linear/cpu/bf16/product.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

constexpr int many_quads = 4, many_outputs = many_quads * quad;  // of a tile
constexpr int most_group = 6;                                    // rows of a tile: 24 Sums
constexpr int64_t most_many = 256;                               // rows per pass: bounds the scratch memory
constexpr int64_t most_whole = 1536;                             // elements of `in` of a tile that has all of them
constexpr int64_t most_part = 768;                               // and of one that goes on: 24 KB of weights
constexpr int64_t many_panel = 4 * many_outputs;                 // outputs that a thread takes at once
constexpr int64_t tile_step = static_cast<int64_t>(many_quads) * block_size;  // weights of a tile for a block of `in`

// A tile's part of `in`: its sums go on where those of the part before stopped.
template <typename Weights>
struct ManyTile {
  const Product<Weights>& product;
  int64_t o, k, k_end;  // its outputs and elements of `in`
  Bfloat16* packed;     // [blocks, quads, a block]

  bool first() const { return k == 0; }
  bool last() const { return k_end == product.in; }

  template <int rows>
  __attribute__((always_inline)) void begin(Sums (&sums)[rows * many_quads], const float* waiting) const {
#pragma GCC unroll 32
    for (int i = 0; i < rows * many_quads; ++i) sums[i] = first() ? no_sums() : load_sums(waiting + i * sums_size);
  }
  template <int rows>
  __attribute__((always_inline)) void end(const Sums (&sums)[rows * many_quads], float* waiting, int64_t row) const {
    if (last()) return product.template finish<rows, many_quads>(sums, row, o);
#pragma GCC unroll 32
    for (int i = 0; i < rows * many_quads; ++i) store_sums(waiting + i * sums_size, sums[i]);
  }
};

template <int rows>
inline void add_packed(Sums (&sums)[rows * many_quads], const Bfloat16* packed, const Bfloat16* x) {
  Block blocks[many_quads];
#pragma GCC unroll 4
  for (int q = 0; q < many_quads; ++q) blocks[q] = load_block(packed + q * block_size);
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    const Input input = load_input(x + r * block_in);
#pragma GCC unroll 4
    for (int q = 0; q < many_quads; ++q) add_products(sums[r * many_quads + q], blocks[q], input);
  }
}

// The first group's rows: weights are read where they lie, and packed for the other groups. x: [blocks, rows, 8].
template <int rows, typename Weights>
__attribute__((noinline)) void first_group(const ManyTile<Weights>& tile, float* waiting, const Bfloat16* x,
                                           Ahead& ahead, int64_t fetches) {
  Sums sums[rows * many_quads];
  tile.template begin<rows>(sums, waiting);
  Bfloat16* packed = tile.packed;
  for (int64_t k = tile.k; k < tile.k_end; k += read_in) {
    if (k % line_in == 0) ahead.fetch(fetches);
#pragma GCC unroll 4
    for (int q = 0; q < many_quads; ++q) {
      Block blocks[read_in / block_in];
      tile.product.weights.read(tile.o + q * quad, k, blocks);
#pragma GCC unroll 2
      for (int j = 0; j < read_in / block_in; ++j) store_block(packed + j * tile_step + q * block_size, blocks[j]);
    }
#pragma GCC unroll 2
    for (int j = 0; j < read_in / block_in; ++j) {
      add_packed<rows>(sums, packed, x);
      packed += tile_step;
      x += rows * block_in;
    }
  }
  tile.template end<rows>(sums, waiting, 0);
}

// Any other group's, over packed weights.
template <int rows, typename Weights>
__attribute__((noinline)) void other_group(const ManyTile<Weights>& tile, float* waiting, const Bfloat16* x,
                                           int64_t row, Ahead& ahead, int64_t fetches) {
  Sums sums[rows * many_quads];
  tile.template begin<rows>(sums, waiting);
  const Bfloat16* packed = tile.packed;
  for (int64_t k = tile.k; k < tile.k_end; k += block_in) {
    if (k % line_in == 0) ahead.fetch(fetches);
    add_packed<rows>(sums, packed, x);
    packed += tile_step;
    x += rows * block_in;
  }
  tile.template end<rows>(sums, waiting, row);
}

// Rows [row, row + rows) as [blocks, rows, 8], with zeros behind the last element, for whole reads of weights.
template <typename Weights>
void pack_inputs(const Product<Weights>& p, Bfloat16* to, int64_t row, int64_t rows) {
  const Bfloat16* const from = p.input + row * p.in;
  const int64_t whole = p.in / block_in * block_in, end = divide_up(p.in, read_in) * read_in;
  for (int64_t k = 0; k < whole; k += block_in) {
    for (int64_t r = 0; r < rows; ++r, to += block_in) memcpy(to, from + r * p.in + k, block_in * sizeof(Bfloat16));
  }
  memset(to, 0, static_cast<size_t>(rows * (end - whole)) * sizeof(Bfloat16));
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(to + r * block_in, from + r * p.in + whole, static_cast<size_t>(p.in - whole) * sizeof(Bfloat16));
  }
}

template <typename Weights>
void many(const Product<Weights>& p, int threads) {
  thread_local Buffer<Bfloat16> scratch;
  const int64_t groups = divide_up(p.rows, most_group), row_size = divide_up(p.in, read_in) * read_in;
  const int64_t parts = p.in <= most_whole ? 1 : divide_up(p.in, most_part);
  const int64_t part = std::max<int64_t>(1, divide_up(divide_up(p.in, parts), line_in)) * line_in;  // of `in`
  threads = static_cast<int>(std::min<int64_t>(threads, divide_up(p.out, many_panel)));
  const int64_t tile_size = many_outputs * part, sums_of_row = many_panel / quad * sums_size;
  Bfloat16* const inputs = scratch.at_least(p.rows * row_size);
  std::atomic<int64_t> next_panel{0};
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t row = group_begin(p.rows, groups, g);
      pack_inputs(p, inputs + row * row_size, row, group_begin(p.rows, groups, g + 1) - row);
    }
    // Each thread's own: where they lie side by side, one core's prefetcher takes lines that another one writes.
    thread_local Buffer<Bfloat16> tile_buffer;
    thread_local Buffer<float> sums_buffer;
    Bfloat16* const packed = tile_buffer.at_least(tile_size);
    float* const sums = sums_buffer.at_least(p.rows * sums_of_row);
    int64_t begin = next_panel++ * many_panel;
    while (begin < p.out) {
      const int64_t following = next_panel++ * many_panel, end = std::min(begin + many_panel, p.out);
      for (int64_t k = 0; k == 0 || k < p.in; k += part) {
        const int64_t k_end = std::min(k + part, p.in);
        for (int64_t o = begin; o < end; o += many_outputs) {
          const ManyTile<Weights> tile{p, o, k, k_end, packed};
          // What is read next: this panel's next tile, or its next part of `in`, or the next panel.
          int64_t next = o + many_outputs, next_k = k;
          if (next >= end) {
            next = k_end < p.in ? begin : following;
            next_k = k_end < p.in ? k_end : 0;
          }
          const int64_t outputs = std::max<int64_t>(0, std::min<int64_t>(many_outputs, p.out - next));
          Ahead ahead = p.weights.ahead(next, outputs, next_k, std::min(next_k + part, p.in));
          const int64_t fetches = divide_up(many_outputs * line_in, groups * cache_line / 2);
          for (int64_t g = 0; g < groups; ++g) {
            const int64_t row = group_begin(p.rows, groups, g), rows = group_begin(p.rows, groups, g + 1) - row;
            float* const waiting = sums + row * sums_of_row + (o - begin) / quad * sums_size * rows;
            const Bfloat16* const x = inputs + row * row_size + k * rows;
            with_rows<most_group>(rows, [&](auto count) {
              if (g == 0) {
                first_group<count>(tile, waiting, x, ahead, fetches);
              } else {
                other_group<count>(tile, waiting, x, row, ahead, fetches);
              }
            });
          }
        }
      }
      begin = following;
    }
  }
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

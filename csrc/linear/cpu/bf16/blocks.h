// Blocks of weights in the exact arithmetic: decoded to the bfloat16 values that `linear` would read. A few rows meet them
// in the registers; for more of them a part of 16 outputs at a time stays in the first-level cache while all rows meet it.
#pragma once

#include <atomic>

#include "core/cpu/memory.h"
#include "linear/cpu/bf16/block_weights.h"
#include "linear/cpu/bf16/many.h"
#include "linear/packed_linear.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

#if defined(__AVX512BF16__)

constexpr int64_t decoded_in = 512;        // elements of `in` that are decoded at once, whole blocks
constexpr int64_t most_blocks_rows = 256;  // rows per pass
constexpr int most_at_once = 4;            // rows that meet weights as they are decoded

// The lines of a tile, which are asked for a few at a time.
struct TileAhead {
  const uint8_t* line;
  int64_t left;

  __attribute__((always_inline)) void fetch(int64_t most) {
    const int64_t count = std::min(most, left);
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(line + i * cache_line, 0, 3);
    line += count * cache_line;
    left -= count;
  }
};

template <WeightFormat format>
int64_t tile_lines(const BlockWeights<format>& weights) {
  return many_quads * weights.group_bytes / cache_line;
}

template <WeightFormat format>
TileAhead ahead_of(const BlockWeights<format>& weights, int64_t o) {
  return {weights.group(o), tile_lines(weights)};
}

// Lines to be fetched for so many runs of a quad, if the next tile is to be there behind this one.
template <WeightFormat format>
int64_t fetches_for(const BlockWeights<format>& weights, int64_t runs) {
  return divide_up(tile_lines(weights) * runs, std::max<int64_t>(1, weights.layout.runs() * many_quads));
}

// The elements [k, k_end) of 16 outputs from o on, to [blocks, quads, a block].
template <WeightFormat format>
__attribute__((noinline)) void decode_tile(const BlockWeights<format>& weights, int64_t o, int64_t k, int64_t k_end,
                                           Bfloat16* to, TileAhead& ahead) {
  using Decoder = QuadDecoder<format>;
  const int64_t fetches = fetches_for(weights, Decoder::page_runs);
  for (int64_t n = k / run_size; n < k_end / run_size; n += Decoder::page_runs) {
    const int64_t count = std::min<int64_t>(Decoder::page_runs, k_end / run_size - n);
    for (int q = 0; q < many_quads; ++q) {
      const uint8_t* const group = weights.group(o) + q * weights.group_bytes;
      typename Decoder::Page page;
      Decoder::read_page(group, n, page);
      ahead.fetch(fetches);
      Bfloat16* const decoded = to + (n * run_size - k) / block_in * tile_step + q * block_size;
      for (int64_t i = 0; i < count; ++i) {
        Decoder::decode_blocks(
            weights.codes(group, n + i), weights.tops(group, n + i), i, page,
            [&](int j, Block block) { store_block(decoded + (i * (run_size / block_in) + j) * tile_step, block); });
      }
    }
  }
}

// All of `in` of some quads from o on, which meet a few rows as they are decoded. x: [blocks, rows, 8].
template <int rows, int quads, WeightFormat format>
__attribute__((noinline)) void multiply_quads(const Product<BlockWeights<format>>& p, int64_t o, const Bfloat16* x,
                                              TileAhead& next) {
  using Decoder = QuadDecoder<format>;
  const BlockWeights<format> weights = p.weights;
  const uint8_t* const groups = weights.group(o);
  const int64_t runs = weights.layout.runs(), fetches = fetches_for(weights, quads);
  TileAhead ahead = next;
  Sums sums[rows * quads];
#pragma GCC unroll 32
  for (Sums& each : sums) each = no_sums();
  for (int64_t n = 0; n < runs; n += Decoder::page_runs) {
    const int64_t count = std::min<int64_t>(Decoder::page_runs, runs - n);
    typename Decoder::Page pages[quads];
    for (int q = 0; q < quads; ++q) Decoder::read_page(groups + q * weights.group_bytes, n, pages[q]);
    for (int64_t i = 0; i < count; ++i) {
      ahead.fetch(fetches);
#pragma GCC unroll 4
      for (int q = 0; q < quads; ++q) {
        const uint8_t* const group = groups + q * weights.group_bytes;
        Decoder::decode_blocks(weights.codes(group, n + i), weights.tops(group, n + i), i, pages[q],
                               [&](int j, Block block) {
#pragma GCC unroll 4
                                 for (int r = 0; r < rows; ++r) {
                                   add_products(sums[r * quads + q], block, load_input(x + (j * rows + r) * block_in));
                                 }
                               });
      }
      x += run_size * rows;
    }
  }
  p.template finish<rows, quads>(sums, 0, o);
  next = ahead;
}

template <int rows, WeightFormat format>
void multiply_tile(const Product<BlockWeights<format>>& p, int64_t o, const Bfloat16* x, TileAhead ahead) {
  constexpr int quads = rows <= 3 ? 4 : 2;  // whose sums and weights fit the registers
  const int64_t end = std::min(o + many_outputs, p.out);
  for (; o < end; o += quads * quad) multiply_quads<rows, quads>(p, o, x, ahead);
}

// Rows [row, row + rows) times a decoded part of `in`; the sums wait in between.
template <int rows, typename Weights>
__attribute__((noinline)) void multiply_decoded(const ManyTile<Weights>& tile, float* waiting, const Bfloat16* x,
                                                int64_t row) {
  Sums sums[rows * many_quads];
  tile.template begin<rows>(sums, waiting);
  const Bfloat16* packed = tile.packed;
  for (int64_t k = tile.k; k < tile.k_end; k += block_in) {
    add_packed<rows>(sums, packed, x);
    packed += tile_step;
    x += rows * block_in;
  }
  tile.template end<rows>(sums, waiting, row);
}

template <typename Weights>
void blocks_product(const Product<Weights>& p, int threads) {
  thread_local Buffer<Bfloat16> scratch;
  const int64_t groups = divide_up(p.rows, most_group), sums_of_row = many_quads * sums_size;
  Bfloat16* const inputs = scratch.at_least(p.rows * p.in);
#pragma omp parallel for schedule(static) num_threads(threads) if (p.rows * p.in > 65536)
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t row = group_begin(p.rows, groups, g);
    pack_inputs(p, inputs + row * p.in, row, group_begin(p.rows, groups, g + 1) - row);
  }
  // As for few rows: long panels read memory in long runs, short ones keep the threads busy to the end.
  const int64_t tiles = std::max<int64_t>(1, std::min<int64_t>(6, p.out / (32 * threads * many_outputs)));
  const int64_t panel = tiles * many_outputs;
  std::atomic<int64_t> next_panel{0};
#pragma omp parallel num_threads(threads)
  {
    // Each thread's own: where they lie side by side, one core's prefetcher takes lines that another one writes.
    thread_local Buffer<Bfloat16> tile_buffer;
    thread_local Buffer<float> sums_buffer;
    Bfloat16* const packed = tile_buffer.at_least(many_outputs * decoded_in);
    float* const all_sums = sums_buffer.at_least(p.rows * sums_of_row);
    int64_t begin = next_panel++ * panel;
    while (begin < p.out) {
      const int64_t following = next_panel++ * panel, end = std::min(begin + panel, p.out);
      for (int64_t o = begin; o < end; o += many_outputs) {
        const int64_t after = o + many_outputs < end ? o + many_outputs : following, next = after < p.out ? after : o;
        if (p.rows <= most_at_once) {
          with_rows<most_at_once>(p.rows,
                                  [&](auto rows) { multiply_tile<rows>(p, o, inputs, ahead_of(p.weights, next)); });
          continue;
        }
        TileAhead ahead = ahead_of(p.weights, next);
        for (int64_t k = 0; k == 0 || k < p.in; k += decoded_in) {
          const ManyTile<Weights> tile{p, o, k, std::min(k + decoded_in, p.in), packed};
          decode_tile(p.weights, o, tile.k, tile.k_end, packed, ahead);
          for (int64_t g = 0; g < groups; ++g) {
            const int64_t row = group_begin(p.rows, groups, g), rows = group_begin(p.rows, groups, g + 1) - row;
            with_rows<most_group>(rows, [&](auto count) {
              multiply_decoded<count>(tile, all_sums + row * sums_of_row, inputs + row * p.in + k * rows, row);
            });
          }
        }
      }
      begin = following;
    }
  }
}

inline void run_blocks(const PackedLinearParams& params) {
  const int64_t out = params.weight.out, in = params.weight.in;
  with_block_format(params.weight.format, [&](auto format) {
    const BlockWeights<format> weights{params.weight.data.as<const uint8_t>(), {out, in}};
    for_passes(product_of(weights, params, in, out), most_blocks_rows, [&](const Product<BlockWeights<format>>& p) {
      blocks_product(p, threads_for(p.rows, in, out, params.launch.threads));
    });
  });
}

#endif

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

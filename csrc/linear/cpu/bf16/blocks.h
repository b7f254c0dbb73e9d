// Blocks of weights in the exact arithmetic: decoded to the bfloat16 values that `linear` would read. A few rows meet them
// in the registers; for more of them a part of 16 outputs at a time stays in the first-level cache while all rows meet it.
#pragma once

#include <atomic>

#include "core/cpu/memory.h"
#include "linear/cpu/bf16/many.h"
#include "linear/packed_blocks.h"
#include "linear/packed_linear.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

#if defined(__AVX512BF16__)

constexpr int64_t decoded_in = 512;        // elements of `in` that are decoded at once, whole blocks
constexpr int64_t most_blocks_rows = 256;  // rows per pass
constexpr int most_at_once = 4;            // rows that meet weights as they are decoded

// Four outputs' weights of one run.
template <WeightFormat format>
struct QuadDecoder {
  using Layout = PackedBlocks<format, quad>;
  static constexpr BlockFormat blocks = Layout::format;
  static constexpr int page_runs = 8, halves = Layout::halves;

  // The scales of a page of up to eight runs: [run, half, output], and the minima [run, output].
  struct Page {
    alignas(64) float scale[page_runs * halves * quad], minimum[page_runs * quad];
  };

  __attribute__((always_inline)) static void read_page(const Layout& layout, const uint8_t* group, int64_t first,
                                                       int64_t runs, Page& page) {
    if constexpr (blocks.nested()) {
      const uint8_t* const head = group + first / page_runs * layout.head_bytes;
      const auto of_quad = [&](int64_t offset) {
        __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(head + offset));
        return _mm512_broadcast_f32x4(_mm_cvtph_ps(bits));
      };
      const __m512 d = of_quad(0);
      const uint8_t* const bytes = head + layout.d_bytes;
      if constexpr (blocks.minimum) {
        // A run's four scales, then its four minima.
        const __m512 dmin = of_quad(2 * quad);
        const __m512 both = _mm512_mask_blend_ps(0xF0F0, d, dmin);
        for (int i = 0; i < 4; ++i) {
          const __m128i two = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * i));
          const __m512 v = _mm512_mul_ps(both, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(two)));
          _mm_store_ps(page.scale + 8 * i, _mm512_castps512_ps128(v));
          _mm_store_ps(page.minimum + 8 * i, _mm512_extractf32x4_ps(v, 1));
          _mm_store_ps(page.scale + 8 * i + 4, _mm512_extractf32x4_ps(v, 2));
          _mm_store_ps(page.minimum + 8 * i + 4, _mm512_extractf32x4_ps(v, 3));
        }
      } else {
        for (int i = 0; i < 4; ++i) {
          const __m128i scales = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * i));
          _mm512_store_ps(page.scale + 16 * i, _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(scales))));
        }
      }
    } else {
      for (int64_t i = 0; i < runs; ++i) {
        const uint8_t* const head = group + (first + i) * layout.head_bytes;
        const auto floats = [&](int64_t offset) {
          return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(head + offset)));
        };
        _mm_store_ps(page.scale + quad * i, floats(0));
        if constexpr (blocks.minimum) _mm_store_ps(page.minimum + quad * i, floats(2 * quad));
      }
    }
  }

  // Run n, the i-th of its page: calls put(number, block) for its four blocks in their order.
  template <typename Put>
  __attribute__((always_inline)) static void decode(const Layout& layout, const uint8_t* group, int64_t n, int64_t i,
                                                    const Page& page, const Put& put) {
    const uint8_t* const codes = group + layout.codes_offset() + n * layout.codes_bytes;
    const uint8_t* const tops = group + layout.tops_offset() + n * layout.tops_bytes;
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
        const int64_t of_half = halves == 2 ? 2 * i + h : i;
        const __m512 scale[2] = {of_two(page.scale + quad * of_half, 0), of_two(page.scale + quad * of_half, 1)};
        __m512 minimum[2];
        if constexpr (blocks.minimum) {
          for (int j = 0; j < 2; ++j) minimum[j] = of_two(page.minimum + quad * i, j);
        }
        // Words that a code is the lowest byte of are the float32 2^23 + code.
        const __m512i code = read_codes(codes, tops, h), two_23 = _mm512_set1_epi16(0x4B00);
        const __m512i zeros = _mm512_setzero_si512();
        const __m512i low = _mm512_unpacklo_epi8(code, zeros), high = _mm512_unpackhi_epi8(code, zeros);
        const auto weights = [&](__m512i words, int j) {
          const __m512 count = _mm512_sub_ps(_mm512_castsi512_ps(words), _mm512_set1_ps(8388608.0f + blocks.zero));
          // Products are exact, so that a fused subtraction rounds as one of its own.
          if constexpr (blocks.minimum) return _mm512_fmsub_ps(count, scale[j], minimum[j]);
          return _mm512_mul_ps(count, scale[j]);
        };
        const __m512 a = weights(_mm512_unpacklo_epi16(low, two_23), 0),
                     b = weights(_mm512_unpackhi_epi16(low, two_23), 1);
        const __m512 c = weights(_mm512_unpacklo_epi16(high, two_23), 0),
                     d = weights(_mm512_unpackhi_epi16(high, two_23), 1);
        put(2 * h, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        put(2 * h + 1, (__m512i)_mm512_cvtne2ps_pbh(d, c));
      }
    }
  }

 private:
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

  // The 16 weights that codes of 4 bits stand for, of each output in 16 bytes: their lower and upper bytes.
  struct Table {
    __m512i low, high;
  };
  __attribute__((always_inline)) static Table read_table(const Page& page, int64_t i) {
    const __m512 count = _mm512_sub_ps(_mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                       _mm512_set1_ps(static_cast<float>(blocks.zero)));
    const auto of_output = [&](int o) {
      const __m512 scale = _mm512_set1_ps(page.scale[quad * i + o]);
      if constexpr (blocks.minimum) return _mm512_fmsub_ps(count, scale, _mm512_set1_ps(page.minimum[quad * i + o]));
      return _mm512_mul_ps(count, scale);
    };
    const __m512i a = (__m512i)_mm512_cvtne2ps_pbh(of_output(1), of_output(0));
    const __m512i b = (__m512i)_mm512_cvtne2ps_pbh(of_output(3), of_output(2));
    const __m512i even =
        _mm512_set_epi8(126, 124, 122, 120, 118, 116, 114, 112, 110, 108, 106, 104, 102, 100, 98, 96, 94, 92, 90, 88,
                        86, 84, 82, 80, 78, 76, 74, 72, 70, 68, 66, 64, 62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40,
                        38, 36, 34, 32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return {_mm512_permutex2var_epi8(a, even, b),
            _mm512_permutex2var_epi8(a, _mm512_or_si512(even, _mm512_set1_epi8(1)), b)};
  }
};

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

template <WeightFormat kind>
struct BlockWeights {
  static constexpr WeightFormat format = kind;
  const uint8_t* data;
  PackedBlocks<kind, quad> layout;
  int64_t group_bytes = layout.group_bytes();

  const uint8_t* tile(int64_t o) const { return data + o / quad * group_bytes; }
  int64_t tile_lines() const { return many_quads * group_bytes / cache_line; }
  // Lines to be fetched for so many runs of a quad, if the next tile is to be there behind this one.
  int64_t fetches(int64_t runs) const {
    return divide_up(tile_lines() * runs, std::max<int64_t>(1, layout.runs() * many_quads));
  }
  TileAhead ahead(int64_t o) const { return {tile(o), tile_lines()}; }
};

// The elements [k, k_end) of 16 outputs from o on, to [blocks, quads, a block].
template <WeightFormat format>
__attribute__((noinline)) void decode_tile(const BlockWeights<format>& weights, int64_t o, int64_t k, int64_t k_end,
                                           Bfloat16* to, TileAhead& ahead) {
  using Decoder = QuadDecoder<format>;
  const typename Decoder::Layout layout = weights.layout;
  const int64_t fetches = weights.fetches(Decoder::page_runs);
  for (int64_t n = k / run_size; n < k_end / run_size; n += Decoder::page_runs) {
    const int64_t count = std::min<int64_t>(Decoder::page_runs, k_end / run_size - n);
    for (int q = 0; q < many_quads; ++q) {
      const uint8_t* const group = weights.tile(o) + q * weights.group_bytes;
      typename Decoder::Page page;
      Decoder::read_page(layout, group, n, count, page);
      ahead.fetch(fetches);
      Bfloat16* const decoded = to + (n * run_size - k) / block_in * tile_step + q * block_size;
      for (int64_t i = 0; i < count; ++i) {
        Decoder::decode(layout, group, n + i, i, page, [&](int j, Block block) {
          store_block(decoded + (i * (run_size / block_in) + j) * tile_step, block);
        });
      }
    }
  }
}

// All of `in` of some quads from o on, which meet a few rows as they are decoded. x: [blocks, rows, 8].
template <int rows, int quads, WeightFormat format>
__attribute__((noinline)) void multiply_quads(const Product<BlockWeights<format>>& p, int64_t o, const Bfloat16* x,
                                              TileAhead& next) {
  using Decoder = QuadDecoder<format>;
  const typename Decoder::Layout layout = p.weights.layout;
  const uint8_t* const groups = p.weights.tile(o);
  const int64_t group_bytes = p.weights.group_bytes, fetches = p.weights.fetches(quads);
  TileAhead ahead = next;
  Sums sums[rows * quads];
#pragma GCC unroll 32
  for (Sums& each : sums) each = no_sums();
  for (int64_t n = 0; n < layout.runs(); n += Decoder::page_runs) {
    const int64_t count = std::min<int64_t>(Decoder::page_runs, layout.runs() - n);
    typename Decoder::Page pages[quads];
    for (int q = 0; q < quads; ++q) Decoder::read_page(layout, groups + q * group_bytes, n, count, pages[q]);
    for (int64_t i = 0; i < count; ++i) {
      ahead.fetch(fetches);
#pragma GCC unroll 4
      for (int q = 0; q < quads; ++q) {
        Decoder::decode(layout, groups + q * group_bytes, n + i, i, pages[q], [&](int j, Block block) {
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
          with_rows<most_at_once>(p.rows, [&](auto rows) { multiply_tile<rows>(p, o, inputs, p.weights.ahead(next)); });
          continue;
        }
        TileAhead ahead = p.weights.ahead(next);
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

// The fast arithmetic (linear/cpu/fast.h) in tiles: an instruction multiplies a run of 16 outputs with 16 rows. Integers
// are exact and the rest is done in the same order, so a row has the bits that it has at every other level.
#pragma once

#include "core/cpu/memory.h"
#include "linear/cpu/amx/tiles.h"
#include "linear/cpu/fast.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

constexpr int64_t unpacked_at_once = 512 << 10;  // bytes, by a thread: they stay in its second-level cache
constexpr int row_step = 4;                      // rows that kernels differ by

// A run of a group, unpacked once for all rows: codes less their zero, four elements of each output together.
template <WeightFormat format>
struct TileRun {
  using Packed = FastRun<format>;
  static constexpr int halves = Packed::halves, parts = Packed::parts / halves;

  int8_t codes[halves][parts][tile_outputs][4];
  float scale[halves][tile_outputs], minimum[tile_outputs];

  void unpack(const FastLayout<format>& layout, const uint8_t* group, int64_t n) {
    Packed packed;
    packed.read(layout, group, n, 0);
    constexpr auto zero = static_cast<uint8_t>(FastCodes<format>::zero);
    for (int h = 0; h < halves; ++h) {
#pragma GCC unroll 8
      for (int i = 0; i < parts; ++i) store_unaligned(&codes[h][i][0][0], packed.codes[h * parts + i] - zero);
      store_unaligned(scale[h], packed.scale[h]);
    }
    if constexpr (Packed::blocks.minimum) store_unaligned(minimum, packed.minimum);
  }
};

// What the tiles are for: four of sums; two of inputs and of weights, one after the other.
constexpr int fast_sums = 4;
constexpr int fast_input(int i) { return 4 + i % 2; }
constexpr int fast_weights(int i) { return 6 + i % 2; }

template <WeightFormat format>
TileConfig fast_config(int rows) {
  using Run = TileRun<format>;
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : Run::parts);
    config.row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? run_size / Run::halves : 64);
  }
  return config;
}

// A group's outputs in `rows` rows, from `row` on.
template <WeightFormat format, int rows>
struct Meeting {
  using Run = TileRun<format>;
  static constexpr int halves = Run::halves;

  const Run* weights;
  const int8_t* codes;
  const float* scales;
  int32_t (*sums)[tile_rows][tile_outputs];  // [fast_sums]

  // Starts with the sums of `count` runs from n on, a tile for each half.
  template <int count>
  __attribute__((always_inline)) void multiply(int64_t n) const {
    for_each<count * halves>([&](auto i) {
      const int64_t run = n + i / halves;
      const int half = i % halves;
      tile_load<fast_input(i)>(codes + run * tile_rows * run_size + half * (run_size / halves), run_size);
      tile_load<fast_weights(i)>(weights[run].codes[half], 64);
      tile_zero<i>();
      tile_add_bytes<i, fast_input(i), fast_weights(i)>();
    });
  }
  template <int count>
  __attribute__((always_inline)) void store() const {
    for_each<count * halves>([&](auto i) { tile_store<i>(sums[i], 64); });
  }
  // Adds the sums of `count` runs to the outputs.
  template <int count>
  __attribute__((always_inline)) void add(int64_t n, FloatVec (&y)[rows]) const {
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      const Run& run = weights[n + i];
      const float* const its = scales + (n + i) * tile_rows * 2;
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
        for (int h = 0; h < halves; ++h) {
          const FloatVec sum = __builtin_convertvector(load_unaligned<IntVec>(sums[i * halves + h][r]), FloatVec);
          y[r] = fused(sum, load_unaligned<FloatVec>(run.scale[h]) * broadcast(its[2 * r]), y[r]);
        }
        if constexpr (Run::Packed::blocks.minimum) {
          y[r] = fused(-load_unaligned<FloatVec>(run.minimum), broadcast(its[2 * r + 1]), y[r]);
        }
      }
    }
  }
};

// A group's outputs in `rows` rows from `row` on, of those that there are. next: so many lines of weights that are asked
// for meanwhile.
template <WeightFormat format, int rows>
__attribute__((noinline)) void meet(const FastProduct<format, tile_rows>& p, const TileRun<format>* weights,
                                    int64_t group, int64_t row, const uint8_t* next, int64_t lines) {
  constexpr int batch = fast_sums / TileRun<format>::halves;
  alignas(64) int32_t sums[fast_sums][tile_rows][tile_outputs];
  const int64_t runs = p.inputs.runs, place = p.inputs.place(row, 0), batches = runs / batch;
  const Meeting<format, rows> meeting{weights, p.inputs.codes + place * run_size, p.inputs.scales + place * 2, sums};
  const int64_t fetched = batches == 0 ? 0 : divide_up(lines, batches);
  FloatVec y[rows] = {};
  for (int64_t i = 0; i < batches; ++i) {
    for (int64_t line = 0; line < fetched; ++line) __builtin_prefetch(next + (i * fetched + line) * fast_line);
    meeting.template multiply<batch>(i * batch);
    if (i > 0) meeting.template add<batch>((i - 1) * batch, y);
    meeting.template store<batch>();
  }
  if (batches > 0) meeting.template add<batch>((batches - 1) * batch, y);
  for (int64_t n = batches * batch; n < runs; ++n) {
    meeting.template multiply<1>(n);
    meeting.template store<1>();
    meeting.template add<1>(n, y);
  }
  FloatVec outputs[rows];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) outputs[r] = y[r];
  finish_rows<rows>(p, group * tile_outputs, row, outputs);
}

template <WeightFormat format, int rows = tile_rows>
void meet_rows(const FastProduct<format, tile_rows>& p, const TileRun<format>* weights, int64_t group, int64_t row,
               const uint8_t* next, int64_t lines) {
  if constexpr (rows > row_step) {
    if (row + rows - row_step >= p.rows) return meet_rows<format, rows - row_step>(p, weights, group, row, next, lines);
  }
  meet<format, rows>(p, weights, group, row, next, lines);
}

// The groups from `begin` to `end` in all rows, while tiles are configured; `following` is what this thread goes on with.
template <WeightFormat format>
void meet_panel(const FastProduct<format, tile_rows>& p, int64_t begin, int64_t end, int64_t following) {
  using Run = TileRun<format>;
  thread_local Buffer<Run> unpacked;
  const int64_t runs = p.inputs.runs;
  Run* const weights = unpacked.at_least((end - begin) * runs);
  for (int64_t group = begin; group < end; ++group) {
    for (int64_t n = 0; n < runs; ++n) weights[(group - begin) * runs + n].unpack(p.layout, p.group(group), n);
  }
  const Configured configured(fast_config<format>(static_cast<int>(std::min<int64_t>(tile_rows, p.rows))));
  const int64_t tiles = divide_up(p.rows, tile_rows), lines = p.layout.group_bytes() / fast_line;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t line = lines * tile / tiles, count = lines * (tile + 1) / tiles - line;
    for (int64_t group = begin; group < end; ++group) {
      const int64_t next = std::min(following + group - begin, p.layout.groups() - 1);
      meet_rows<format>(p, weights + (group - begin) * runs, group, tile * tile_rows, p.group(next) + line * fast_line,
                        count);
    }
  }
}

// Many rows: a thread unpacks a few groups, which then meet all of them.
template <WeightFormat format>
void meet_all(const FastProduct<format, tile_rows>& product, const Bfloat16* input, int threads) {
  const int64_t bytes = product.layout.runs() * static_cast<int64_t>(sizeof(TileRun<format>));  // of a group
  const int64_t most_groups = std::clamp<int64_t>(unpacked_at_once / std::max<int64_t>(bytes, 1), 1, 4);
  fast_product(product, input, threads, most_groups, meet_panel<format>);
}

inline void fast_in_tiles(const PackedLinearParams& params) {
  fast_passes<tile_rows>(
      params, [&](const auto& product, const Bfloat16* input) { meet_all(product, input, params.launch.threads); });
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

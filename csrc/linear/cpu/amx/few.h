// Few rows: up to four tiles of weights go over all of `in` with their sums in tiles, and ask for what comes soon.
#pragma once

#include <atomic>

#include "core/cpu/memory.h"
#include "linear/cpu/amx/sums.h"
#include "linear/cpu/amx/weights.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

constexpr int64_t most_few = 4 * tile_rows;
// Of `in`: how far ahead weights are asked for. Not so far as the next tiles, which may be more than the second-level
// cache holds; far enough for the bytes that are on their way from memory at once.
constexpr int64_t fetch_steps = 4;

// Outputs from o on, `weights` tiles of them, all rows. next: the output that comes after.
template <int weights, int inputs, typename Weights>
__attribute__((noinline)) void few_tiles(const Product<Weights>& p, const Inputs& x, int64_t o, int64_t next) {
  using Sums = TileSums<weights, inputs>;
  WeightTiles<weights, Weights> tiles(p.weights, o);
  Sums::zero();
  if (x.steps > 0) tiles.prepare(0);
  for (int64_t step = 0; step < x.steps; ++step) {
    const int64_t k = step * step_in, ahead = step + fetch_steps;
    const bool same = ahead < x.steps;
    for (int i = 0; i < weights * tile_outputs; i += quad) {
      p.weights.fetch((same ? o : next) + i, (same ? ahead : ahead - x.steps) * step_in);
    }
    if (step + 1 < x.steps) tiles.prepare(k + step_in);
    Sums::add_step(x, 0, step, [&](auto tile, int i) { tiles.template load<tile>(i, k); });
  }
  Sums::finish(p, x, 0, o);
}

// The sums of four products overlap: one alone waits for the one before it.
template <int weights, int inputs, typename Weights>
void few_panels(const Product<Weights>& p, const Inputs& x, int threads) {
  constexpr int64_t width = weights * tile_outputs;
  // Long panels read memory in long runs, short ones keep the threads busy to the end. They are handed out one by one,
  // since the draft may be running on one of the cores, and one ahead, since tiles ask for the next ones' weights.
  const int64_t tiles = std::min<int64_t>(4, p.out / (16 * threads * width));
  const int64_t share = divide_up(divide_up(p.out, threads), tile_outputs) * tile_outputs;
  const int64_t panel = tiles > 0 ? tiles * width : std::min(share, width);
  std::atomic<int64_t> next_panel{0};
#pragma omp parallel num_threads(threads)
  {
    const Tiles configured(x.columns);
    int64_t begin = next_panel++ * panel;
    while (begin < p.out) {
      const int64_t following = next_panel++ * panel, end = std::min(begin + panel, p.out);
      for (int64_t o = begin; o < end;) {
        // A last tile of fewer outputs counts as a whole one.
        const bool whole = o + width - tile_outputs < end;
        const int64_t after = o + (whole ? width : tile_outputs), next = after < end ? after : following;
        if (whole) {
          few_tiles<weights, inputs>(p, x, o, next);
        } else {
          few_tiles<1, inputs>(p, x, o, next);
        }
        o = after;
      }
      begin = following;
    }
  }
}

template <typename Weights>
void few(const Product<Weights>& p, int threads) {
  thread_local Buffer<Bfloat16> scratch;
  Inputs x{p.in, p.rows};
  x.data = scratch.at_least(x.size());
  for (int64_t tile = 0; tile < x.tiles; ++tile) x.pack(p.input, tile);
  switch (x.tiles) {
    // Those that are read where they lie are as many streams of memory as they have rows.
    case 1: return few_panels<std::is_same_v<Weights, Dense> ? 2 : 4, 1>(p, x, threads);
    case 2: return few_panels<2, 2>(p, x, threads);
    case 3: return few_panels<1, 3>(p, x, threads);
    default: return few_panels<1, 4>(p, x, threads);
  }
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

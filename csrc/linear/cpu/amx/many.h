// Many rows: a part of two tiles of outputs, copied once so that it lies together, meets all rows while it and the
// inputs' part are in the second-level cache.
#pragma once

#include <atomic>

#include "core/cpu/memory.h"
#include "linear/cpu/amx/sums.h"
#include "linear/cpu/amx/weights.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

constexpr int pair = 2;  // tiles of weights, and of inputs, that are multiplied with each other
constexpr int64_t pair_outputs = pair * tile_outputs;
constexpr int64_t pair_sums = pair * pair * tile_sums;
constexpr int64_t most_many = 512;  // rows per pass: bounds the scratch memory
constexpr int64_t most_steps = 32;  // of a part of `in`: 64 KB of weights, and 1 MB of inputs for all rows
constexpr int64_t most_panel = 4 * pair_outputs;  // outputs that a thread takes at once: they share the inputs' part

// A part of `in` of a pair of weight tiles.
template <typename Weights>
struct Part {
  const Product<Weights>& product;
  const Inputs& x;
  int64_t o, step, end;  // its outputs and steps
  Bfloat16* copied;      // [steps, pair, a tile]

  Bfloat16* copy_of(int64_t s) const { return copied + (s - step) * pair * tile_weights; }

  // Input tiles from `input` on. first: the weights are still to be copied, a step before they are loaded, so that what
  // is stored has reached the cache by then. waiting: the sums so far.
  template <int inputs, bool first>
  __attribute__((noinline)) void meet(int64_t input, float* waiting, Ahead& ahead, int64_t fetches) const {
    using Sums = TileSums<pair, inputs>;
    if (step == 0) {
      Sums::zero();
    } else {
      Sums::load(waiting);
    }
    TileCopiers<pair, Weights> copiers(product.weights, o);
    if (first && step < end) copiers.copy(step * step_in, copy_of(step));
    for (int64_t s = step; s < end; ++s) {
      ahead.fetch(fetches);
      if (first && s + 1 < end) copiers.copy((s + 1) * step_in, copy_of(s + 1));
      Sums::add_step(x, input, s, [&](auto tile, int i) { tile_load<tile>(copy_of(s) + i * tile_weights, row_bytes); });
    }
    if (end == x.steps) {
      Sums::finish(product, x, input * tile_rows, o);
    } else {
      Sums::store(waiting);
    }
  }

  template <int inputs>
  void meet(int64_t input, float* waiting, Ahead& ahead, int64_t fetches) const {
    if (input == 0) {
      meet<inputs, true>(input, waiting, ahead, fetches);
    } else {
      meet<inputs, false>(input, waiting, ahead, fetches);
    }
  }
};

template <typename Weights>
void many(const Product<Weights>& p, int threads) {
  thread_local Buffer<Bfloat16> scratch;
  thread_local Buffer<float> scratch_sums;
  Inputs x{p.in, p.rows};
  const int64_t parts = std::max<int64_t>(1, divide_up(x.steps, most_steps));
  const int64_t part = std::max<int64_t>(1, divide_up(x.steps, parts));
  const int64_t panel = std::min(most_panel, divide_up(divide_up(p.out, 2 * threads), pair_outputs) * pair_outputs);
  threads = static_cast<int>(std::min<int64_t>(threads, divide_up(p.out, panel)));
  const int64_t groups = divide_up(x.tiles, pair), copy_size = pair * part * tile_weights;
  const int64_t sums_size_of_panel = parts == 1 ? 0 : panel / pair_outputs * groups * pair_sums;
  x.data = scratch.at_least(x.size() + threads * copy_size);
  Bfloat16* const copies = x.data + x.size();
  float* const sums = scratch_sums.at_least(threads * sums_size_of_panel);
  std::atomic<int64_t> next_panel{0}, next_thread{0};
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < x.tiles; ++tile) x.pack(p.input, tile);
    const Tiles configured(x.columns);
    const int64_t thread = next_thread++;
    int64_t begin = next_panel++ * panel;
    while (begin < p.out) {
      const int64_t following = next_panel++ * panel, end = std::min(begin + panel, p.out);
      for (int64_t step = 0; step == 0 || step < x.steps; step += part) {
        const int64_t step_end = std::min(step + part, x.steps);
        for (int64_t o = begin; o < end; o += pair_outputs) {
          const Part<Weights> tiles{p, x, o, step, step_end, copies + thread * copy_size};
          // What is read next: this panel's next outputs, or its next part of `in`, or the next panel.
          int64_t next = o + pair_outputs, next_step = step;
          if (next >= end) {
            next = step_end < x.steps ? begin : following;
            next_step = step_end < x.steps ? step_end : 0;
          }
          const int64_t outputs = std::max<int64_t>(0, std::min<int64_t>(pair_outputs, p.out - next));
          const int64_t next_end = std::min(next_step + part, x.steps);
          Ahead ahead = p.weights.ahead(next, outputs, next_step * step_in, std::min(next_end * step_in, p.in));
          const int64_t fetches =
              divide_up(pair_outputs, groups);  // lines: a step of the next weights has one an output
          float* const waiting = sums + thread * sums_size_of_panel + (o - begin) / pair_outputs * groups * pair_sums;
          for (int64_t g = 0; g < groups; ++g) {
            const int64_t input = g * pair;
            float* const its = waiting + g * pair_sums;
            if (input + pair <= x.tiles) {
              tiles.template meet<pair>(input, its, ahead, fetches);
            } else {
              tiles.template meet<1>(input, its, ahead, fetches);
            }
          }
        }
      }
      begin = following;
    }
  }
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

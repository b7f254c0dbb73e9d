// Weights as tiles: 16 outputs, a row each, of 32 elements of `in`. What lies beyond the weight counts as 0.
#pragma once

#include "linear/cpu/amx/inputs.h"
#include "linear/cpu/bf16/dense.h"
#include "linear/cpu/bf16/lossless.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

constexpr int64_t row_bytes = step_in * sizeof(Bfloat16);  // of a tile of weights that lies by itself

// Writes the tile at output o and element k, aligned to cache lines.
inline void copy_tile(const Dense& weights, int64_t o, int64_t k, Bfloat16* to) {
  const __mmask32 read = first_elements(weights.in - k);
  const Bfloat16* const from = weights.weight + o * weights.stride + k;
  for (int64_t i = 0; i < tile_outputs; ++i) {
    const __mmask32 mask = o + i < weights.out ? read : 0;
    _mm512_store_si512(to + i * step_in, _mm512_maskz_loadu_epi16(mask, from + i * weights.stride));
  }
}

inline void copy_tile(const LosslessWeights& weights, int64_t o, int64_t k, Bfloat16* to) {
#pragma GCC unroll 4
  for (int i = 0; i < tile_outputs; i += quad) {
    Block first[read_in / block_in], second[read_in / block_in];
    weights.read(o + i, k, first);
    weights.read(o + i, k + read_in, second);
    transpose_parts(first[0], first[1], second[0], second[1]);
    Bfloat16* const row = to + static_cast<int64_t>(i) * step_in;
    _mm512_store_si512(row, first[0]);
    _mm512_store_si512(row + step_in, first[1]);
    _mm512_store_si512(row + 2 * step_in, second[0]);
    _mm512_store_si512(row + 3 * step_in, second[1]);
  }
}

// `count` tiles from output o on, for one step of `in` after the other. prepare(k) comes a step before they are loaded,
// so that what it stores has reached the cache.
template <int count, typename Weights>
class WeightTiles {
 public:
  WeightTiles(const Weights& weights, int64_t o) : weights_(weights), o_(o) {}

  __attribute__((always_inline)) void prepare(int64_t k) {
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) copy_tile(weights_, o_ + i * tile_outputs, k, prepared_[k / step_in % 2][i]);
  }
  template <int tile>
  __attribute__((always_inline)) void load(int i, int64_t k) {
    tile_load<tile>(prepared_[k / step_in % 2][i], row_bytes);
  }

 private:
  const Weights& weights_;
  int64_t o_;
  alignas(64) Bfloat16 prepared_[2][count][tile_weights];
};

// Loaded from where they lie.
template <int count>
class WeightTiles<count, Dense> {
 public:
  WeightTiles(const Dense& weights, int64_t o) : weights_(weights), o_(o) {}

  void prepare(int64_t) {}
  template <int tile>
  __attribute__((always_inline)) void load(int i, int64_t k) {
    const int64_t first = o_ + i * tile_outputs;
    if (__builtin_expect(first + tile_outputs <= weights_.out && k + step_in <= weights_.in, 1)) {
      tile_load<tile>(weights_.weight + first * weights_.stride + k,
                      weights_.stride * static_cast<int64_t>(sizeof(Bfloat16)));
    } else {
      copy_edge(first, k);
      tile_load<tile>(edge_, row_bytes);
    }
  }

 private:
  __attribute__((noinline)) void copy_edge(int64_t o, int64_t k) { copy_tile(weights_, o, k, edge_); }

  const Dense& weights_;
  int64_t o_;
  alignas(64) Bfloat16 edge_[tile_weights];
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

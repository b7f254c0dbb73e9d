// Weights as tiles: 16 outputs, a row each, of 32 elements of `in`. What lies beyond the weight counts as 0.
#pragma once

#include <cstring>
#include <utility>

#include "linear/cpu/amx/inputs.h"
#include "linear/cpu/bf16/block_weights.h"
#include "linear/cpu/bf16/dense.h"
#include "linear/cpu/bf16/lossless.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

constexpr int64_t row_bytes = step_in * sizeof(Bfloat16);  // of a tile of weights that lies by itself

// Copies the tiles of 16 outputs from o on: copy(k, to) writes that of the elements from k on, aligned to cache lines.
template <typename Weights>
class TileCopier;

template <>
class TileCopier<Dense> {
 public:
  TileCopier(const Dense& weights, int64_t o) : weights_(weights), o_(o) {}

  void copy(int64_t k, Bfloat16* to) const {
    const __mmask32 read = first_elements(weights_.in - k);
    const Bfloat16* const from = weights_.weight + o_ * weights_.stride + k;
    for (int64_t i = 0; i < tile_outputs; ++i) {
      const __mmask32 mask = o_ + i < weights_.out ? read : 0;
      _mm512_store_si512(to + i * step_in, _mm512_maskz_loadu_epi16(mask, from + i * weights_.stride));
    }
  }

 private:
  const Dense& weights_;
  int64_t o_;
};

template <>
class TileCopier<LosslessWeights> {
 public:
  TileCopier(const LosslessWeights& weights, int64_t o) : weights_(weights), o_(o) {}

  __attribute__((always_inline)) void copy(int64_t k, Bfloat16* to) const {
#pragma GCC unroll 4
    for (int i = 0; i < tile_outputs; i += quad) {
      Block first[read_in / block_in], second[read_in / block_in];
      weights_.read(o_ + i, k, first);
      weights_.read(o_ + i, k + read_in, second);
      transpose_parts(first[0], first[1], second[0], second[1]);
      Bfloat16* const row = to + static_cast<int64_t>(i) * step_in;
      _mm512_store_si512(row, first[0]);
      _mm512_store_si512(row + step_in, first[1]);
      _mm512_store_si512(row + 2 * step_in, second[0]);
      _mm512_store_si512(row + 3 * step_in, second[1]);
    }
  }

 private:
  const LosslessWeights& weights_;
  int64_t o_;
};

// Steps come in ascending order, so that a page's scales are read once.
template <WeightFormat format>
class TileCopier<BlockWeights<format>> {
 public:
  using Weights = BlockWeights<format>;

  TileCopier(const Weights& weights, int64_t o)
      : weights_(weights), group_(weights.group(o)), inside_(o < weights.layout.out) {}

  __attribute__((always_inline)) void copy(int64_t k, Bfloat16* to) {
    if (__builtin_expect(!inside_, 0)) {
      memset(to, 0, tile_weights * sizeof(Bfloat16));
      return;
    }
    const int64_t n = k / step_in, page = n / Decoder::page_runs, i = n % Decoder::page_runs;
    if (page != page_) {
      page_ = page;
      const int64_t first = page * Decoder::page_runs;
      for (int q = 0; q < quads; ++q) {
        Decoder::read_page(group_ + q * weights_.group_bytes, first, pages_[q]);
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < quads; ++q) {
      const uint8_t* const group = group_ + q * weights_.group_bytes;
      Decoder::decode_rows(weights_.codes(group, n), weights_.tops(group, n), i, pages_[q], to + q * quad * step_in);
    }
  }

 private:
  using Decoder = typename Weights::Decoder;
  static_assert(run_size == step_in, "a step is a run");
  static constexpr int quads = tile_outputs / quad;

  const Weights& weights_;
  const uint8_t* group_;
  bool inside_;
  int64_t page_ = -1;
  typename Decoder::Page pages_[quads];
};

// Of `count` times 16 outputs: tiles behind each other.
template <int count, typename Weights>
class TileCopiers {
 public:
  TileCopiers(const Weights& weights, int64_t o) : TileCopiers(weights, o, std::make_integer_sequence<int, count>()) {}

  __attribute__((always_inline)) void copy(int64_t k, Bfloat16* to) {
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) each_[i].copy(k, to + i * tile_weights);
  }

 private:
  template <int... i>
  TileCopiers(const Weights& weights, int64_t o, std::integer_sequence<int, i...>)
      : each_{TileCopier<Weights>(weights, o + i * tile_outputs)...} {}

  TileCopier<Weights> each_[count];
};

// `count` tiles from output o on, for one step of `in` after the other. prepare(k) comes a step before they are loaded,
// so that what it stores has reached the cache.
template <int count, typename Weights>
class WeightTiles {
 public:
  WeightTiles(const Weights& weights, int64_t o) : copiers_(weights, o) {}

  __attribute__((always_inline)) void prepare(int64_t k) { copiers_.copy(k, prepared_[k / step_in % 2]); }
  template <int tile>
  __attribute__((always_inline)) void load(int i, int64_t k) {
    tile_load<tile>(prepared_[k / step_in % 2] + i * tile_weights, row_bytes);
  }

 private:
  TileCopiers<count, Weights> copiers_;
  alignas(64) Bfloat16 prepared_[2][count * tile_weights];
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
  __attribute__((noinline)) void copy_edge(int64_t o, int64_t k) { TileCopier<Dense>(weights_, o).copy(k, edge_); }

  const Dense& weights_;
  int64_t o_;
  alignas(64) Bfloat16 edge_[tile_weights];
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

// Tiles of sums: an output's products with a row are added up in one float32, 32 elements of `in` an instruction, in
// ascending order. Whoever computes a product does so, so that a row gets the same bits from every kernel.
#pragma once

#include "linear/cpu/amx/inputs.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

template <int weights, int inputs>
struct TileSums {
  static void zero() {
    for_each<weights * inputs>([](auto i) { tile_zero<i>(); });
  }
  // As many tiles of 16 x 16, one after the other.
  static void load(const float* from) {
    for_each<weights * inputs>([&](auto i) { tile_load<i>(from + i * tile_sums, tile_rows * sizeof(float)); });
  }
  static void store(float* to) {
    for_each<weights * inputs>([&](auto i) { tile_store<i>(to + i * tile_sums, tile_rows * sizeof(float)); });
  }

  // load_weights(tile, i) loads weight tile i into that tile.
  template <typename Load>
  __attribute__((always_inline)) static void add_step(const Inputs& x, int64_t input, int64_t step,
                                                      const Load& load_weights) {
    constexpr bool all_fit = inputs <= 2;
    static_assert(all_fit || weights == 1, "else the inputs are loaded again for each tile of weights");
    const auto load_input = [&](auto j) { tile_load<input_tile<inputs>(j)>(x.at(input + j, step), x.stride()); };
    if constexpr (all_fit) for_each<inputs>(load_input);
    for_each<weights>([&](auto i) {
      constexpr int weight = weight_tile<inputs>(i);
      load_weights(std::integral_constant<int, weight>(), i);
      for_each<inputs>([&](auto j) {
        if constexpr (!all_fit) load_input(j);
        tile_add_products<sums_tile<inputs>(i, j), weight, input_tile<inputs>(j)>();
      });
    });
  }

  // The sums are complete: those from output o and row `row` on are rounded; outputs and rows beyond the last are left
  // out.
  template <typename Weights>
  static void finish(const Product<Weights>& p, const Inputs& x, int64_t row, int64_t o) {
    for_each<weights>([&](auto i) {
      const int64_t output = o + i * tile_outputs;
      for_each<inputs>([&](auto j) {
        alignas(64) float sums[tile_sums];
        tile_store<sums_tile<inputs>(i, j)>(sums, x.stride());
        if (output < p.out) finish_tile(p, x.columns, sums, row + j * tile_rows, output);
      });
    });
  }

 private:
  template <typename Weights>
  static void finish_tile(const Product<Weights>& p, int columns, float* sums, int64_t row, int64_t o) {
    if (columns > 1) {
      __m512i parts[tile_outputs];
#pragma GCC unroll 16
      for (int i = 0; i < tile_outputs; ++i) parts[i] = _mm512_loadu_si512(sums + i * columns);
      transpose(parts);
#pragma GCC unroll 16
      for (int i = 0; i < tile_rows; ++i) _mm512_store_si512(sums + i * tile_outputs, parts[i]);
    }
    const int64_t outputs = std::min<int64_t>(tile_outputs, p.out - o), end = std::min(row + columns, p.rows);
    for (int64_t r = row; r < end; ++r, sums += tile_outputs) {
      store_outputs(p.output + r * p.stride + o, sums, p.bias == nullptr ? nullptr : p.bias + o, outputs);
    }
  }
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

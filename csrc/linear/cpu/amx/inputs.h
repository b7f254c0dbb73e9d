// Inputs as tiles: of up to 16 rows, 32 elements, as [pairs of elements, rows].
#pragma once

#include "linear/cpu/amx/tiles.h"
#include "linear/cpu/amx/transpose.h"
#include "linear/cpu/bf16/product.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

// The lowest `count` of 32 elements, up to all of them.
inline __mmask32 first_elements(int64_t count) { return static_cast<__mmask32>(low_bits(count < 32 ? count : 32)); }

// [tiles of rows, steps of `in`, 16 pairs, columns]; zeros behind the last element and, where there are several tiles,
// the last row.
struct Inputs {
  int64_t in, rows;
  int columns = static_cast<int>(std::min<int64_t>(rows, tile_rows));
  int64_t steps = divide_up(in, step_in), tiles = divide_up(rows, tile_rows), tile_size = int64_t{step_in} * columns;
  Bfloat16* data = nullptr;

  int64_t size() const { return tiles * steps * tile_size; }
  Bfloat16* at(int64_t tile, int64_t step) const { return data + (tile * steps + step) * tile_size; }
  int64_t stride() const { return columns * static_cast<int64_t>(sizeof(float)); }  // bytes

  // Writes one tile's rows. from: the first row of all.
  void pack(const Bfloat16* from, int64_t tile) const {
    const int64_t row = tile * tile_rows, count = std::min<int64_t>(tile_rows, rows - row);
    const __mmask16 written = static_cast<__mmask16>(low_bits(columns));
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t k = step * step_in;
      const __mmask32 read = first_elements(in - k);
      const auto load = [&](int64_t r) { return _mm512_maskz_loadu_epi16(read, from + (row + r) * in + k); };
      Bfloat16* const to = at(tile, step);
      if (columns == 1) {  // as it lies
        _mm512_storeu_si512(to, load(0));
        continue;
      }
      __m512i parts[tile_rows];
#pragma GCC unroll 16
      for (int r = 0; r < tile_rows; ++r) parts[r] = r < count ? load(r) : _mm512_setzero_si512();
      transpose(parts);
#pragma GCC unroll 16
      for (int i = 0; i < tile_rows; ++i) _mm512_mask_storeu_epi32(to + i * columns * 2, written, parts[i]);
    }
  }
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

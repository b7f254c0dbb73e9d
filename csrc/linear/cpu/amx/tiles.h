// The tile instructions (Intel's AMX): eight tiles of up to 16 rows of 64 bytes, and a product of two tiles of bfloat16
// that is added to one of float32.
//
// In assembly: with GCC 12's intrinsics a load of a tile tells the compiler nothing of the memory that it reads, and
// stores to it may come too late or not at all. A tile's number is a template argument.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/isa.h"
#include "core/storage.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

constexpr int tile_outputs = 16;                      // rows of a tile of weights, and of sums
constexpr int tile_rows = 16;                         // at most: columns of a tile of inputs, and of sums
constexpr int step_in = 32;                           // elements of `in` that an instruction takes
constexpr int tile_weights = tile_outputs * step_in;  // bfloat16
constexpr int tile_sums = tile_outputs * tile_rows;   // floats

template <typename Body, int... numbers>
__attribute__((always_inline)) inline void for_each(const Body& body, std::integer_sequence<int, numbers...>) {
  (body(std::integral_constant<int, numbers>()), ...);
}

// Calls body(number as a type) for 0 to count - 1.
template <int count, typename Body>
__attribute__((always_inline)) inline void for_each(const Body& body) {
  for_each(body, std::make_integer_sequence<int, count>());
}

// What LDTILECFG reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "as the instruction has it");

inline void tile_config(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
inline void tile_release() { asm volatile("tilerelease" : : : "memory"); }

template <int tile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// stride: bytes from row to row.
template <int tile>
inline void tile_load(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void tile_store(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(tile) : "memory");
}

// sums[i][j] += the products of row i of a and column j of b, 16 pairs: those of the first elements are added up, those
// of the second ones too, and then both. Subnormal inputs and results count as 0.
template <int sums, int a, int b>
inline void tile_add_products() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
}

// The same of bytes, all signed, four at a time, added to sums of 32 bits.
template <int sums, int a, int b>
inline void tile_add_bytes() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
}

// What the tiles are for, up to four of sums: those of weight tile i and input tile j are tile i * inputs + j.
template <int inputs>
constexpr int sums_tile(int i, int j) {
  return i * inputs + j;
}
// Three of the weights' at most, one after the other.
template <int inputs>
constexpr int weight_tile(int i) {
  return 4 + i % (inputs == 1 ? 3 : 2);
}
// Two of the inputs', one after the other where there are more.
template <int inputs>
constexpr int input_tile(int j) {
  return inputs == 1 ? 7 : 6 + j % 2;
}

// The tiles of the calling thread, from here to the end of the scope.
class Configured {
 public:
  explicit Configured(const TileConfig& config) { tile_config(config); }
  ~Configured() { tile_release(); }
  Configured(const Configured&) = delete;
  Configured& operator=(const Configured&) = delete;
};

// For products of bfloat16. columns: rows of the input in a tile; 16 where there are two input tiles.
class Tiles : Configured {
 public:
  explicit Tiles(int columns) : Configured(config_of(columns)) {}

 private:
  static TileConfig config_of(int columns) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      const bool weights = tile >= 4 && tile < 7;
      config.rows[tile] = 16;
      config.row_bytes[tile] = static_cast<uint16_t>(weights ? step_in * sizeof(Bfloat16) : columns * sizeof(float));
    }
    return config;
  }
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

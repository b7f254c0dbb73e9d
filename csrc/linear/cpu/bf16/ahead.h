// Fetches what is read next into the second-level cache, a few lines at a time.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

constexpr int64_t cache_line = 64;  // bytes
constexpr int line_in = 32;         // elements of bfloat16 in one

// `pieces` pieces of `lines` cache lines each, `stride` bytes apart.
struct Ahead {
  const char* piece;
  int64_t stride, lines, pieces;
  int64_t line = 0;

  __attribute__((always_inline)) void fetch(int64_t count) {
    for (; count > 0 && pieces > 0; --count) {
      __builtin_prefetch(piece + line * cache_line, 0, 2);
      if (++line == lines) {
        line = 0;
        piece += stride;
        --pieces;
      }
    }
  }
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

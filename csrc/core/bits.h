// Small integer functions of CPU and CUDA kernels.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

SPECBRANCH_HD constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The lowest `count` bits; none for a negative count.
SPECBRANCH_HD inline uint64_t low_bits(int64_t count) {
  return count >= 64 ? ~uint64_t{0} : count <= 0 ? 0 : (uint64_t{1} << count) - 1;
}

// Which of `bins` bins a number lies in: the whole part, held between the first and the last one. NaN, which an overflow
// before may give, lies in the last one.
SPECBRANCH_HD inline int bin_of(float x, int bins) {
  if (!(x < static_cast<float>(bins - 1))) return bins - 1;
  return x > 0.0f ? static_cast<int>(x) : 0;
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

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

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

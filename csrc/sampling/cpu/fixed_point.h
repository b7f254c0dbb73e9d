// Weights exp(z - z_max) as 40-bit fixed point, so that their sums do not depend on any order.
#pragma once

#include "core/cpu/simd.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

inline uint64_t fixed_point(float weight) { return static_cast<uint64_t>(weight * two_to_40); }

// The same for a vector, as two 20-bit digits. Every step is exact.
struct FixedPointVec {
  IntVec high, low;

  explicit FixedPointVec(FloatVec weight) {
    const FloatVec scaled = weight * two_to_20;
    high = __builtin_convertvector(scaled, IntVec);
    low = __builtin_convertvector((scaled - __builtin_convertvector(high, FloatVec)) * two_to_20, IntVec);
  }
};

// Sums at most 4095 values per lane.
class MassSum {
 public:
  void add(const FixedPointVec& q) {
    high_ += (UintVec)q.high;
    low_ += (UintVec)q.low;
  }
  void add(const FixedPointVec& q, IntVec mask) {
    high_ += (UintVec)(q.high & mask);
    low_ += (UintVec)(q.low & mask);
  }
  uint64_t total() const {
    uint64_t high = 0, low = 0;
    for (int i = 0; i < simd_width; ++i) {
      high += high_[i];
      low += low_[i];
    }
    return (high << 20) + low;
  }

 private:
  UintVec high_{}, low_{};
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

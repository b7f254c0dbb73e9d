// Rows cut into segments, and what the passes of sample_rows learn about each.
#pragma once

#include <atomic>
#include <cstdint>

#include "core/isa.h"
#include "sampling/filters.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

// The same for any number of threads, so that sums over segments are too.
struct Segments {
  static constexpr int64_t max_length = 8192;  // also what keeps 32-bit lanes of MassSum from overflowing
  int64_t vocabulary, count, length;

  explicit Segments(int64_t v) : vocabulary(v), count((v + max_length - 1) / max_length) {
    const int64_t even = (v + count - 1) / count;
    length = (even + 63) / 64 * 64;  // whole Philox blocks and vectors
    count = (v + length - 1) / length;
  }
  int64_t begin(int64_t s) const { return s * length; }
  int64_t end(int64_t s) const { return (s + 1) * length < vocabulary ? (s + 1) * length : vocabulary; }
};

struct SegmentState {
  float max_logit, mass;  // mass: see segment_mass
  bool nan;
  uint64_t weight_above, weight_total;  // of the threshold search, see threshold.h
  int64_t listed;                       // tokens on the segment's list
  uint64_t kept_mass;                   // statistics
  double kept_mass_times_distance;
};

struct RowState {
  RowReport::Problem problem;
  float z_max;
  float mass;       // of exp(z - z_max) within 4%, with top-p
  int64_t argmax;   // lowest token with the largest logit
  float threshold;  // kept: z >= threshold ...
  float low, high;  // the bracket being searched
  bool listed_all;  // the row's list holds every token with z >= low
  int64_t listed;
  std::atomic<float> score_floor;  // some k tokens are known to score at least this
  std::atomic<int64_t> pending;    // segments that the current pass has not finished
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

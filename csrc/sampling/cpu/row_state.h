// Rows cut into segments, and what the passes of sample_rows learn about each.
#pragma once

#include <atomic>
#include <cfloat>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "core/isa.h"
#include "sampling/filters.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

// Uninitialised memory for plain types. (No std::vector here: its code would be shared between levels.)
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(std::malloc(static_cast<size_t>(count > 0 ? count : 1) * sizeof(T)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T& operator[](int64_t i) { return data_[i]; }
  T* at(int64_t i) { return data_ + i; }

 private:
  T* data_;
};

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
  float mass;         // of exp(z - z_max) within 4%, with top-p
  int64_t argmax;     // lowest token with the largest logit
  float threshold;    // kept: z >= threshold ...
  float low, high;    // the bracket being searched
  bool listed_all;    // the row's list holds every token with z >= low
  int64_t listed;
  std::atomic<float> score_floor;  // some k tokens are known to score at least this
  std::atomic<int64_t> pending;    // segments that the current pass has not finished
};

// z below this is a masked token (-inf).
constexpr float lowest_finite = -FLT_MAX;

// One token as a candidate: larger score first, then the lower token.
struct Candidate {
  float score;
  float z;
  int64_t token;

  bool before(const Candidate& other) const {
    return score > other.score || (score == other.score && token < other.token);
  }
};

// The best k candidates so far, in order.
class Best {
 public:
  Best(Candidate* storage, int64_t k) : items_(storage), k_(k) {}

  int64_t size() const { return size_; }
  const Candidate& operator[](int64_t i) const { return items_[i]; }
  // A candidate below this cannot enter; one equal to it may, by its token.
  float floor() const { return size_ < k_ ? -HUGE_VALF : items_[k_ - 1].score; }

  void offer(const Candidate& candidate) {
    if (size_ == k_ && !candidate.before(items_[k_ - 1])) return;
    int64_t i = size_ < k_ ? size_++ : k_ - 1;
    for (; i > 0 && candidate.before(items_[i - 1]); --i) items_[i] = items_[i - 1];
    items_[i] = candidate;
  }

 private:
  Candidate* items_;
  int64_t k_, size_ = 0;
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

// Candidates for a row's token, and the best k of them.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/isa.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

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

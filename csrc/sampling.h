// What verify and draft_sample have in common: how logits become a distribution, and the noise that draws from it.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "isa.h"
#include "tensor.h"

namespace specbranch {

// Applied in this order. Each is a threshold on the scaled logit, so tied tokens stay or go together.
struct Filters {
  double temperature;  // 0: greedy, and the filters below are not applied
  int64_t top_k;       // 0: off
  double top_p;        // 1: off
  double min_p;        // 0: off

  bool greedy() const { return temperature == 0.0; }
  float inverse_temperature() const { return greedy() ? 1.0f : static_cast<float>(1.0 / temperature); }
};

inline void check_filters(const Filters& f) {
  const auto refuse = [](const char* name, double value, const char* expected) {
    fail(std::string(name) + ": expected " + expected + ", got " + std::to_string(value));
  };
  // The negations also refuse NaN. Below 1e-38 the inverse would be infinite in float32.
  if (!(f.temperature == 0.0 || (f.temperature >= 1e-38 && std::isfinite(f.temperature)))) {
    refuse("temperature", f.temperature, "0 or a number from 1e-38 up");
  }
  if (f.top_k < 0) refuse("top_k", static_cast<double>(f.top_k), "0 (off) or more");
  if (!(f.top_p > 0.0 && f.top_p <= 1.0)) refuse("top_p", f.top_p, "a number above 0 and up to 1");
  if (!(f.min_p >= 0.0 && f.min_p <= 1.0)) refuse("min_p", f.min_p, "a number from 0 to 1");
}

// logits [n, V] with contiguous rows, positions int64 [n], seed int64 [].
inline void check_sampling_inputs(const Tensor& logits, const Tensor& positions, const Tensor& seed) {
  check_shape(logits, {-1, -1}, "[n, V]");
  check_float(logits);
  check_last_dim_contiguous(logits);
  if (logits.shape[0] < 1 || logits.shape[1] < 1 || logits.shape[1] > INT32_MAX) {
    fail(std::string(logits.name) + ": expected at least one row and 1 to 2^31 - 1 tokens, got " + shape_text(logits));
  }
  check_dtype(positions, Dtype::int64);
  check_shape(positions, {logits.shape[0]}, "[n]");
  check_contiguous(positions);
  check_dtype(seed, Dtype::int64);
  if (seed.dims != 0) fail(std::string(seed.name) + ": expected shape [], got " + shape_text(seed));
}

// Whether verify needs the row of a node: the root's, and every other one that is in the tree.
SPECBRANCH_HD inline bool counts_in_tree(const int64_t* parents, int64_t node) {
  return node == 0 || parents[node] >= 0;
}

// The first row that cannot be sampled, if any. Found while the kernel runs, raised by the caller.
struct RowReport {
  enum Problem { none, nan, infinite, all_masked, overflow };
  int64_t row = -1;
  Problem problem = none;

  void raise(const Tensor& logits) const {
    if (problem == none) return;
    static const char* const text[] = {"", "NaN", "+inf", "only -inf (every token is masked)",
                                       "values that overflow float32 when divided by the temperature"};
    fail(std::string(logits.name) + ": row " + std::to_string(row) + " has " + text[problem] +
         "; expected finite logits, or -inf for masked tokens");
  }
};

}  // namespace specbranch

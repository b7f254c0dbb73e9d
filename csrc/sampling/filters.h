// What verify and draft_sample have in common: how logits become a distribution, and the noise that draws from it.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <string>

#include "core/isa.h"
#include "core/tensor.h"

namespace specbranch {

constexpr float lowest_finite = -FLT_MAX;  // a scaled logit below this is a masked token (-inf)

// Applied in this order. Each is a threshold on the scaled logit, so tied tokens stay or go together. A float64 tensor
// [4] has the same layout.
struct Filters {
  double temperature;  // 0: greedy, and the filters below are not applied
  double top_k;        // a whole number; 0: off
  double top_p;        // 1: off
  double min_p;        // 0: off

  SPECBRANCH_HD bool greedy() const { return temperature == 0.0; }
  SPECBRANCH_HD float inverse_temperature() const { return greedy() ? 1.0f : static_cast<float>(1.0 / temperature); }
  // Whether top-k, or top-p, needs a threshold.
  SPECBRANCH_HD bool searches_count(int64_t vocabulary) const {
    return !greedy() && top_k > 0.0 && top_k < static_cast<double>(vocabulary);
  }
  SPECBRANCH_HD bool searches_mass() const { return !greedy() && top_p < 1.0; }

  // Whether each is in range; NaN never is. Below 1e-38 the inverse would be infinite in float32, and far above 1e38 it
  // would be 0, which makes NaN of a masked token.
  SPECBRANCH_HD bool valid_temperature() const {
    return temperature == 0.0 || (temperature >= 1e-38 && temperature <= 1e38);
  }
  SPECBRANCH_HD bool valid_top_k() const { return top_k >= 0.0 && top_k <= DBL_MAX && floor(top_k) == top_k; }
  SPECBRANCH_HD bool valid_top_p() const { return top_p > 0.0 && top_p <= 1.0; }
  SPECBRANCH_HD bool valid_min_p() const { return min_p >= 0.0 && min_p <= 1.0; }
  SPECBRANCH_HD bool valid() const { return valid_temperature() && valid_top_k() && valid_top_p() && valid_min_p(); }
};

// Filters that the kernel reads in place of numbers: on the CPU one for each row, or none.
struct FiltersInMemory {
  const Filters* first = nullptr;
  bool by_row = false;  // else one for all rows

  SPECBRANCH_HD const Filters& of_row(int64_t row) const { return first[by_row ? row : 0]; }
};

// where: what the error's text begins with.
inline void check_filters(const Filters& f, const std::string& where = "") {
  const auto refuse = [&where](const char* name, double value, const char* expected) {
    fail(where + name + ": expected " + expected + ", got " + number_text(value));
  };
  if (!f.valid_temperature()) refuse("temperature", f.temperature, "0 or a number from 1e-38 to 1e38");
  if (!f.valid_top_k()) refuse("top_k", f.top_k, "0 (off) or a whole number above");
  if (!f.valid_top_p()) refuse("top_p", f.top_p, "a number above 0 and up to 1");
  if (!f.valid_min_p()) refuse("min_p", f.min_p, "a number from 0 to 1");
}

// filters float64 [4], or [n, 4] for n rows, given in place of numbers: those must be off.
inline void check_filters_tensor(const Tensor& filters, const Filters& numbers, int64_t n) {
  const auto refuse = [](const char* name, double value) {
    fail(std::string(name) + ": expected no number beside filters, got " + number_text(value));
  };
  if (numbers.temperature != 0.0) refuse("temperature", numbers.temperature);
  if (numbers.top_k != 0.0) refuse("top_k", numbers.top_k);
  if (numbers.top_p != 1.0) refuse("top_p", numbers.top_p);
  if (numbers.min_p != 0.0) refuse("min_p", numbers.min_p);
  check_dtype(filters, Dtype::float64);
  if (filters.dims == 2) {
    check_shape(filters, {n, 4}, "[n, 4]");
  } else {
    check_shape(filters, {4}, "[4]");
  }
  check_contiguous(filters);
}

// seed int64 [].
inline void check_seed(const Tensor& seed) {
  check_dtype(seed, Dtype::int64);
  if (seed.dims != 0) fail(std::string(seed.name) + ": expected shape [], got " + shape_text(seed));
}

// seed int64 [], or [n] for n rows.
inline void check_seeds(const Tensor& seed, int64_t n) {
  check_dtype(seed, Dtype::int64);
  if (seed.dims == 0) return;
  check_shape(seed, {n}, "[n]");
  check_contiguous(seed);
}

// logits [n, V] with contiguous rows, positions int64 [n].
inline void check_sampling_inputs(const Tensor& logits, const Tensor& positions) {
  check_shape(logits, {-1, -1}, "[n, V]");
  check_float(logits);
  check_last_dim_contiguous(logits);
  if (logits.shape[0] < 1 || logits.shape[1] < 1 || logits.shape[1] > INT32_MAX) {
    fail(std::string(logits.name) + ": expected at least one row and 1 to 2^31 - 1 tokens, got " + shape_text(logits));
  }
  check_dtype(positions, Dtype::int64);
  check_shape(positions, {logits.shape[0]}, "[n]");
  check_contiguous(positions);
}

// allowed int32 [n, ceil(V / 32)] for logits [n, V]: token t of row i may be chosen iff bit t % 32 of word t / 32 of row
// i is set, as if its logit were -inf otherwise, whatever it is. Bits of tokens from V on mean nothing. Rows may have any
// stride. (The layout of llguidance and xgrammar.)
inline void check_allowed(const Tensor& allowed, const Tensor& logits) {
  check_shape(allowed, {logits.shape[0], (logits.shape[1] + 31) / 32}, "[n, ceil(V / 32)]");
  check_dtype(allowed, Dtype::int32);
  check_last_dim_contiguous(allowed);
}

// Whether verify needs the row of a node: the root's, and every other one that is in the tree.
SPECBRANCH_HD inline bool counts_in_tree(const int64_t* parents, int64_t node, int64_t root = 0) {
  return node == root || parents[node] >= 0;
}

// The first row that cannot be sampled, if any. Found while the kernel runs, raised by the caller.
struct RowReport {
  enum Problem { none, nan, infinite, all_masked, overflow };
  int64_t row = -1;
  Problem problem = none;

  // has_allowed: whether the call says which tokens are allowed.
  void raise(const Tensor& logits, bool has_allowed) const {
    if (problem == none) return;
    static const char* const text[] = {"", "NaN", "+inf", "only -inf (every token is masked)",
                                       "values that overflow float32 when divided by the temperature"};
    const char* const none_left = "only -inf among the tokens that allowed allows (every token is masked)";
    fail(std::string(logits.name) + ": row " + std::to_string(row) + " has " +
         (has_allowed && problem == all_masked ? none_left : text[problem]) +
         "; expected finite logits, or -inf for masked tokens");
  }
};

}  // namespace specbranch

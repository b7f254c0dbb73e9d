// Online calibration: how likely the target agrees with a drafted token, learned from the verdicts while decoding.
// policies/calibration.py says what it is for; tests/support/plain_calibration.py defines it with numpy.
#pragma once

#include <array>
#include <cstdint>

#include "tree/proposals.h"
#include "tree/tree.h"

namespace specbranch {

class Calibration {
 public:
  static constexpr int features = 8;
  using Vector = std::array<double, features>;
  using Matrix = std::array<Vector, features>;

  // All that it has learned: weights and covariance of the logistic model, how many labels there were, whether the
  // newest judged token was accepted, and how many were lately, how often the other candidates held the target's token
  // (covered) of the times that the first was not it (missed).
  struct State {
    Vector weights;
    Matrix covariance;
    int64_t labels;
    double last, lately, covered, missed;
  };

  Calibration();

  // Turn confidence in a node's candidates into the chance, for each, that the target picks it. Raises
  // std::invalid_argument without signals or candidates. confidence may be that of the proposals.
  void correct(const Proposals& proposals, double* confidence) const;

  // One label: whether the target's token was the first candidate there, or (covered) any candidate.
  void learn(const Signals& signals, bool accepted, bool covered);

  // A verdict's labels: at every accepted node, the root first, the token that the target went on with.
  void observe(const Tree& tree, const Nodes& path, int64_t next_token);

  State state;

 private:
  Vector features_of(const Signals& signals) const;
  Vector spread_of(const Vector& x) const;
};

}  // namespace specbranch

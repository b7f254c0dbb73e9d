// Online calibration: how likely the target agrees with a drafted or a retrieved token, learned from the verdicts while
// decoding. policies/calibration.py says what it is for; tests/support/plain_calibration.py defines it with numpy.
#pragma once

#include <cstdint>
#include <vector>

#include "tree/found.h"
#include "tree/online_logistic.h"
#include "tree/proposals.h"
#include "tree/tree.h"

namespace specbranch {

class Calibration {
 public:
  using Drafted = OnlineLogistic<9>;
  using Retrieved = OnlineLogistic<9>;

  // The newest labels of a model: how many there were, whether the newest one was yes, and the share that were lately.
  struct Labels {
    int64_t count;
    double last, lately;
    void add(bool label);
  };

  // All that it has learned: both models with their labels, and how often the draft's other candidates held the target's
  // token (covered) of the times that the first was not it (missed).
  struct State {
    Drafted drafted;
    Labels drafted_labels;
    double covered, missed;
    Retrieved retrieved;
    Labels retrieved_labels;
  };

  Calibration();

  // ---- The draft's candidates

  // Turn confidence in a node's candidates into the chance, for each, that the target picks it. Raises
  // std::invalid_argument without signals or candidates. confidence may be that of the proposals.
  void correct(const Proposals& proposals, double* confidence) const;

  // One label: whether the target's token was the first candidate there, or (covered) any candidate.
  void learn(const Signals& signals, bool accepted, bool covered);

  // A verdict's labels: at every accepted node, the root first, the token that the target went on with.
  void observe(const Tree& tree, const Nodes& path, int64_t next_token);

  // ---- Retrieved tokens

  // The chance that the target picks each, if it picks those before it.
  std::vector<double> chances(const Continuations& found) const;

  // One label: whether the target's token was this one. first: no other one was found there that ranks higher.
  void learn_retrieved(const Found& found, bool accepted);

  // A verdict's labels for what was retrieved below the accepted nodes.
  void observe_retrieved(const Tree& tree, const Nodes& path, int64_t next_token);

  State state;

 private:
  Drafted::Vector features_of(const Signals& signals) const;
  Retrieved::Vector features_of(const Found& found) const;
};

}  // namespace specbranch

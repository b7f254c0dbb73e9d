// What the draft proposes after nodes of a tree. No Python, no torch.
#pragma once

#include <cstdint>
#include <vector>

namespace specbranch {

// See Signals in core/tree.py.
struct Signals {
  double agreement = 0, entropy = 0, margin = 0;
  int64_t depth = 0;
  double forecast = 0, retrieved = 0;
};

// The candidates after one node, best first, with the probability that the target picks each. It points into the
// columns that hold them, until those grow. signals: null where there are none.
struct Proposals {
  const int64_t* tokens = nullptr;
  const double* confidence = nullptr;
  int64_t count = 0;
  const Signals* signals = nullptr;
};

// Proposals after many nodes: each one's candidates behind those of the one before.
class ProposalColumns {
 public:
  int64_t size() const { return static_cast<int64_t>(places_.size()); }
  Proposals operator[](int64_t index) const;
  double* confidence(int64_t index) { return confidence_.data() + places_[index].first; }
  // Null where there are none.
  Signals* signals(int64_t index) {
    return places_[index].signals < 0 ? nullptr : signals_.data() + places_[index].signals;
  }

  // Append some, piece by piece: candidates, then what there is to say of all that came since the last end().
  void candidate(int64_t token, double confidence);
  void end();
  void end(const Signals& signals);
  // They must not be its own.
  void add(const Proposals& proposals);

 private:
  struct Place {
    int64_t first, count, signals;
  };
  std::vector<int64_t> tokens_;
  std::vector<double> confidence_;
  std::vector<Signals> signals_;
  std::vector<Place> places_;
};

// One node's row of draft_sample: candidates, best first, their perturbed scores, and the draft's probabilities of them
// where those are the confidence (at temperature 0), else null. Tokens below 0 stand for candidates that there are none
// of.
struct SampledRow {
  const int64_t* tokens;
  const double* scores;
  const double* confidence;
  int64_t count;
  double entropy;
};

// A draft's run over some nodes, then over the first candidates of each step: [steps][nodes], step by step.
struct ProposalRows {
  ProposalColumns columns;
  int64_t nodes = 0;  // of each step

  int64_t steps() const { return nodes ? columns.size() / nodes : 0; }
};

// Append what the draft says after a node at `depth`. forecast: see Signals. Raises std::invalid_argument for a row
// without candidates.
void add_sampled(ProposalColumns& columns, const SampledRow& row, int64_t depth, double forecast);

}  // namespace specbranch

#include "tree/calibration.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace specbranch {
namespace {

// Bias, logit of the agreement, entropy, margin, depth, last token accepted, tokens accepted lately, forecast, what was
// retrieved.
constexpr Calibration::Drafted::Vector drafted_mean{0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1};  // the draft's own
constexpr Calibration::Drafted::Vector drafted_spread{0.7, 0.3, 0.2, 0.1, 0.1, 0.5, 0.5, 0.1, 0.1};
constexpr double covered = 0.75;  // prior chance that the target's token is among the others where the first is not it
constexpr double covered_weight = 8;
constexpr double drafted_lately = 0.8;  // prior share of tokens that are accepted

// Bias, length of the match, log-odds of the share, occurrences, another ranks higher, last one accepted, accepted lately,
// a corpus, found where it was expected. The means are those of 4,900 tokens of ten tasks (benchmarks/results/README.md,
// "Retrieval").
constexpr Calibration::Retrieved::Vector retrieved_mean{-0.1, 1.2, 0.5, 0.4, -1.9, -0.3, 0.0, 0.0, 0.8};
constexpr Calibration::Retrieved::Vector retrieved_spread{0.5, 0.3, 0.2, 0.3, 0.5, 0.3, 0.5, 0.5, 0.5};
constexpr double retrieved_lately = 0.6;

}  // namespace

void Calibration::Labels::add(bool label) {
  ++count;
  last = label;
  lately = 0.9 * lately + 0.1 * label;
}

Calibration::Calibration()
    : state{{drafted_mean, drafted_spread, 0.999},
            {0, 1.0, drafted_lately},
            covered_weight * covered,
            covered_weight,
            {retrieved_mean, retrieved_spread, 0.995},
            {0, 1.0, retrieved_lately}} {}

// ---- The draft's candidates

Calibration::Drafted::Vector Calibration::features_of(const Signals& signals) const {
  const double agreement = std::clamp(signals.agreement, 1e-4, 1 - 1e-4);
  return {1.0,
          std::log(agreement / (1 - agreement)),
          signals.entropy - 1.0,
          std::min(signals.margin, 8.0) - 2.0,
          std::log1p(static_cast<double>(signals.depth)) - 1.0,
          state.drafted_labels.last - drafted_lately,
          state.drafted_labels.lately - drafted_lately,
          signals.forecast,
          signals.retrieved};
}

void Calibration::correct(const Proposals& proposals, double* confidence) const {
  if (!proposals.signals) throw std::invalid_argument("proposals: expected some with signals");
  if (!proposals.count) throw std::invalid_argument("proposals: expected candidates");
  const double first = state.drafted.chance(features_of(*proposals.signals));
  const double* before = proposals.confidence;
  const double others = std::accumulate(before, before + proposals.count, 0.0) - before[0];
  const double scale = others > 0 ? (1 - first) * (state.covered / state.missed) / others : 0.0;
  confidence[0] = first;
  for (int64_t i = 1; i < proposals.count; ++i) confidence[i] = scale * before[i];
}

void Calibration::learn(const Signals& signals, bool accepted, bool covered) {
  state.drafted.learn(features_of(signals), accepted);
  state.drafted_labels.add(accepted);
  if (!accepted) {
    state.covered = 0.99 * state.covered + covered;
    state.missed = 0.99 * state.missed + 1;
  }
}

void Calibration::observe(const Tree& tree, const Nodes& path, int64_t next_token) {
  if (path.empty()) throw std::invalid_argument("path: expected the root at least");
  for (size_t i = 0; i < path.size(); ++i) {
    const int64_t token = i + 1 < path.size() ? tree.node(path[i + 1]).token : next_token;
    const std::optional<Proposals> proposals = tree.proposals(path[i]);
    if (tree.is_bound(path[i])) continue;  // it was no choice
    if (!proposals || !proposals->signals || !proposals->count) continue;
    const int64_t* end = proposals->tokens + proposals->count;
    learn(*proposals->signals, proposals->tokens[0] == token, std::find(proposals->tokens, end, token) != end);
  }
}

// ---- Retrieved tokens

Calibration::Retrieved::Vector Calibration::features_of(const Found& found) const {
  const double count = static_cast<double>(found.count), others = static_cast<double>(found.total - found.count);
  return {1.0,
          std::log(static_cast<double>(found.match)) - 1.0,
          std::log((count + 0.5) / (others + 0.5)),
          std::log(count),
          found.first ? 0.0 : 1.0,
          state.retrieved_labels.last - retrieved_lately,
          state.retrieved_labels.lately - retrieved_lately,
          found.source > 0 ? 1.0 : 0.0,
          found.near ? 1.0 : 0.0};
}

std::vector<double> Calibration::chances(const Continuations& found) const {
  std::vector<double> chances(found.size()), sums(found.size() + 1);
  for (int64_t i = 0; i < found.size(); ++i) {
    chances[i] = state.retrieved.chance(features_of(found_at(found, i)));
    sums[found.parent[i] + 1] += chances[i];
  }
  for (int64_t i = 0; i < found.size(); ++i) chances[i] /= std::max(1.0, sums[found.parent[i] + 1]);
  return chances;
}

void Calibration::learn_retrieved(const Found& found, bool accepted) {
  state.retrieved.learn(features_of(found), accepted);
  if (found.first) state.retrieved_labels.add(accepted);
}

void Calibration::observe_retrieved(const Tree& tree, const Nodes& path, int64_t next_token) {
  if (path.empty()) throw std::invalid_argument("path: expected the root at least");
  for (size_t i = 0; i < path.size(); ++i) {
    const int64_t token = i + 1 < path.size() ? tree.node(path[i + 1]).token : next_token;
    if (tree.is_bound(path[i])) continue;
    for (const int64_t child : tree.children(path[i])) {
      if (const Tree::Retrieved* retrieved = tree.retrieved(child)) {
        learn_retrieved(retrieved->found, tree.node(child).token == token);
      }
    }
  }
}

}  // namespace specbranch

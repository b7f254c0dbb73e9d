#include "tree/calibration.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace specbranch {
namespace {

using Vector = Calibration::Vector;

// Bias, logit of the agreement, entropy, margin, depth, last token accepted, tokens accepted lately, forecast.
constexpr Vector prior_mean{0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0};  // the draft's own probability
constexpr Vector prior_spread{0.7, 0.3, 0.2, 0.1, 0.1, 0.5, 0.5, 0.1};
constexpr double forgetting = 0.999;  // the text changes its subject
constexpr double covered = 0.75;  // prior chance that the target's token is among the others where the first is not it
constexpr double covered_weight = 8;
constexpr double lately = 0.8;  // prior share of tokens that are accepted
constexpr double pi_8 = 3.14159265358979323846 / 8;

double dot(const Vector& a, const Vector& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

}  // namespace

Calibration::Calibration() : state{prior_mean, {}, 0, 1.0, lately, covered_weight * covered, covered_weight} {
  for (int i = 0; i < features; ++i) state.covariance[i][i] = prior_spread[i] * prior_spread[i];
}

Vector Calibration::features_of(const Signals& signals) const {
  const double agreement = std::clamp(signals.agreement, 1e-4, 1 - 1e-4);
  return {1.0,
          std::log(agreement / (1 - agreement)),
          signals.entropy - 1.0,
          std::min(signals.margin, 8.0) - 2.0,
          std::log1p(static_cast<double>(signals.depth)) - 1.0,
          state.last - lately,
          state.lately - lately,
          signals.forecast};
}

// covariance x
Vector Calibration::spread_of(const Vector& x) const {
  Vector spread;
  for (int i = 0; i < features; ++i) spread[i] = dot(state.covariance[i], x);
  return spread;
}

void Calibration::correct(const Proposals& proposals, double* confidence) const {
  if (!proposals.signals) throw std::invalid_argument("proposals: expected some with signals");
  if (!proposals.count) throw std::invalid_argument("proposals: expected candidates");
  const Vector x = features_of(*proposals.signals);
  // The mean over the weights' uncertainty, by MacKay's approximation: less sure while little is known.
  const double spread = std::sqrt(1 + pi_8 * dot(x, spread_of(x)));
  const double first = sigmoid(dot(x, state.weights) / spread);
  const double* before = proposals.confidence;
  const double others = std::accumulate(before, before + proposals.count, 0.0) - before[0];
  const double scale = others > 0 ? (1 - first) * (state.covered / state.missed) / others : 0.0;
  confidence[0] = first;
  for (int64_t i = 1; i < proposals.count; ++i) confidence[i] = scale * before[i];
}

void Calibration::learn(const Signals& signals, bool accepted, bool covered) {
  const Vector x = features_of(signals);
  const double p = sigmoid(dot(x, state.weights));
  const Vector spread = spread_of(x);
  const double variance = p * (1 - p);
  const double scale = 1 + variance * dot(x, spread);
  double trace = 0;
  for (int i = 0; i < features; ++i) {
    const double gain = spread[i] / scale;
    state.weights[i] += gain * (accepted - p);
    for (int j = 0; j < features; ++j) {
      state.covariance[i][j] = (state.covariance[i][j] - variance * (gain * spread[j])) / forgetting;
    }
    trace += state.covariance[i][i];
  }
  // Forgetting must not let what is never observed grow without bound.
  const double shrink = std::min(1.0, dot(prior_spread, prior_spread) / trace);
  for (Vector& row : state.covariance) {
    for (double& each : row) each *= shrink;
  }
  ++state.labels;
  state.last = accepted;
  state.lately = 0.9 * state.lately + 0.1 * accepted;
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
    if (!proposals || !proposals->signals || !proposals->count) continue;
    const int64_t* end = proposals->tokens + proposals->count;
    learn(*proposals->signals, proposals->tokens[0] == token, std::find(proposals->tokens, end, token) != end);
  }
}

}  // namespace specbranch

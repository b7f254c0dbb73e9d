// A logistic model that learns label by label: the extended Kalman filter of logistic regression.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

namespace specbranch {

template <int features>
struct OnlineLogistic {
  using Vector = std::array<double, features>;
  using Matrix = std::array<Vector, features>;

  // prior_spread: of the weights, the deviation that they are expected to have. forgetting: how much a label counts when
  // there is one more: the text changes its subject.
  OnlineLogistic(const Vector& prior_mean, const Vector& prior_spread, double forgetting)
      : weights(prior_mean), covariance{}, most_trace(dot(prior_spread, prior_spread)), forgetting(forgetting) {
    for (int i = 0; i < features; ++i) covariance[i][i] = prior_spread[i] * prior_spread[i];
  }

  // The mean over the weights' uncertainty, by MacKay's approximation: less sure while little is known.
  double chance(const Vector& x) const {
    constexpr double pi_8 = 3.14159265358979323846 / 8;
    return sigmoid(dot(x, weights) / std::sqrt(1 + pi_8 * dot(x, spread_of(x))));
  }

  void learn(const Vector& x, bool label) {
    const double p = sigmoid(dot(x, weights));
    const Vector spread = spread_of(x);
    const double variance = p * (1 - p);
    const double scale = 1 + variance * dot(x, spread);
    double trace = 0;
    for (int i = 0; i < features; ++i) {
      const double gain = spread[i] / scale;
      weights[i] += gain * (label - p);
      for (int j = 0; j < features; ++j) {
        covariance[i][j] = (covariance[i][j] - variance * (gain * spread[j])) / forgetting;
      }
      trace += covariance[i][i];
    }
    // Forgetting must not let what is never observed grow without bound.
    const double shrink = std::min(1.0, most_trace / trace);
    for (Vector& row : covariance) {
      for (double& each : row) each *= shrink;
    }
  }

  Vector weights;
  Matrix covariance;

 private:
  static double dot(const Vector& a, const Vector& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }

  static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

  // covariance x
  Vector spread_of(const Vector& x) const {
    Vector spread;
    for (int i = 0; i < features; ++i) spread[i] = dot(covariance[i], x);
    return spread;
  }

  double most_trace, forgetting;
};

}  // namespace specbranch

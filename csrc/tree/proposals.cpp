#include "tree/proposals.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

namespace specbranch {

Proposals ProposalColumns::operator[](int64_t index) const {
  const Place& place = places_[index];
  return {tokens_.data() + place.first, confidence_.data() + place.first, place.count,
          place.signals < 0 ? nullptr : signals_.data() + place.signals};
}

void ProposalColumns::candidate(int64_t token, double confidence) {
  tokens_.push_back(token);
  confidence_.push_back(confidence);
}

void ProposalColumns::end() {
  const int64_t first = places_.empty() ? 0 : places_.back().first + places_.back().count;
  places_.push_back({first, static_cast<int64_t>(tokens_.size()) - first, -1});
}

void ProposalColumns::end(const Signals& signals) {
  end();
  places_.back().signals = static_cast<int64_t>(signals_.size());
  signals_.push_back(signals);
}

void ProposalColumns::add(const Proposals& proposals) {
  for (int64_t i = 0; i < proposals.count; ++i) candidate(proposals.tokens[i], proposals.confidence[i]);
  if (proposals.signals) {
    end(*proposals.signals);
  } else {
    end();
  }
}

void add_sampled(ProposalColumns& columns, const SampledRow& row, int64_t depth, double forecast) {
  const auto count = std::count_if(row.tokens, row.tokens + row.count, [](int64_t token) { return token >= 0; });
  if (count == 0) {  // on a device, where a kernel cannot raise
    throw std::invalid_argument("draft_logits: a row has NaN or +inf, or masks every token");
  }
  Signals signals;
  signals.entropy = row.entropy;
  signals.margin = count > 1 ? row.scores[0] - row.scores[1] : std::numeric_limits<double>::infinity();
  signals.depth = depth;
  signals.forecast = forecast;
  if (row.confidence) {
    signals.agreement = row.confidence[0];
    for (int64_t i = 0; i < count; ++i) columns.candidate(row.tokens[i], row.confidence[i]);
    columns.end(signals);
    return;
  }
  // The estimated chance that the target, under the same noise, picks each candidate: a softmax of perturbed scores. The
  // noise is known, so a candidate far ahead of the next is likely the target's too, however flat the draft's
  // distribution is. At temperature 0 the same formula is the draft's probability.
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double weight = std::exp(row.scores[i] - row.scores[0]);
    columns.candidate(row.tokens[i], weight);
    total += weight;
  }
  signals.agreement = 1 / total;
  columns.end(signals);
  double* confidence = columns.confidence(columns.size() - 1);
  for (int64_t i = 0; i < count; ++i) confidence[i] /= total;
}

}  // namespace specbranch

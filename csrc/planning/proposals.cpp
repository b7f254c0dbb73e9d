// A draft's run, from draft_sample's lists and back.
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "planning/bindings.h"
#include "tree/proposals.h"

namespace specbranch {
namespace {

using namespace py::literals;

// One node's row, held while it is read.
struct Row {
  Nodes tokens;
  std::vector<double> scores, confidence;
  bool has_confidence = false;
  double entropy = 0;

  SampledRow get() const {
    if (scores.size() != tokens.size() || (has_confidence && confidence.size() != tokens.size())) {
      throw py::value_error("scores, confidence: expected as many as tokens in each row");
    }
    return {tokens.data(), scores.data(), has_confidence ? confidence.data() : nullptr,
            static_cast<int64_t>(tokens.size()), entropy};
  }
};

// One step of a draft, from draft_sample's results as lists.
void add_step(ProposalRows& rows, py::handle tokens, py::handle scores, py::handle confidence, py::handle entropy,
              const Nodes& depths, const std::pair<double, double>& forecast) {
  const auto nodes = static_cast<int64_t>(depths.size());
  const auto column = [&](py::handle given, const char* name) {
    Items items(given, "expected a list of lists, and one of entropies");
    if (items.size() != nodes) {
      throw py::value_error(std::string(name) + ": expected one for each of " + std::to_string(nodes) +
                            " depths, got " + std::to_string(items.size()));
    }
    return items;
  };
  if (rows.columns.size() && rows.nodes != nodes) {
    throw py::value_error("depths: expected " + std::to_string(rows.nodes) + ", as in the step before");
  }
  const Items all_tokens = column(tokens, "tokens"), all_scores = column(scores, "scores");
  const Items all_entropy = column(entropy, "entropy");
  std::optional<Items> all_confidence;
  if (!confidence.is_none()) all_confidence = column(confidence, "confidence");
  ProposalColumns step;  // whole, or nothing is added
  Row row;
  row.has_confidence = all_confidence.has_value();
  for (int64_t i = 0; i < nodes; ++i) {
    read_integers(all_tokens[i], row.tokens);
    read_numbers(all_scores[i], row.scores);
    if (all_confidence) read_numbers((*all_confidence)[i], row.confidence);
    row.entropy = number(all_entropy[i]);
    add_sampled(step, row.get(), depths[i], depths[i] == 0 ? forecast.first : forecast.second);
  }
  rows.nodes = nodes;
  for (int64_t i = 0; i < nodes; ++i) rows.columns.add(step[i]);
}

py::list step_of(const ProposalRows& rows, int64_t step) {
  if (step < 0) step += rows.steps();
  if (step < 0 || step >= rows.steps()) throw py::index_error("a step that is none");
  py::list found(rows.nodes);
  for (int64_t i = 0; i < rows.nodes; ++i) found[i] = python_proposals(rows.columns[step * rows.nodes + i]);
  return found;
}

}  // namespace

void bind_proposals(py::module_& m) {
  m.def("use", [](const py::type& choice, const py::type& proposals, const py::type& signals) {
    const auto kept = [](const py::type& each) { return reinterpret_cast<PyTypeObject*>(each.inc_ref().ptr()); };
    value_classes = {kept(choice), kept(proposals), kept(signals)};
  });
  py::class_<ProposalRows>(m, "ProposalRows")
      .def(py::init<>())
      .def("add", &add_step, "tokens"_a, "scores"_a, "confidence"_a, "entropy"_a, "depths"_a, "forecast"_a)
      .def("__len__", &ProposalRows::steps)
      .def("__getitem__", &step_of)
      .def("__iter__", [](const ProposalRows& rows) {
        py::list steps;
        for (int64_t step = 0; step < rows.steps(); ++step) steps.append(step_of(rows, step));
        return py::iter(steps);
      });
}

}  // namespace specbranch

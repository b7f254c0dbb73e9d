// The calibration.
#include <string>
#include <type_traits>

#include "planning/bindings.h"
#include "tree/calibration.h"

namespace specbranch {
namespace {

using namespace py::literals;

py::list correct(const Calibration& calibration, const py::sequence& proposals) {
  py::list corrected;
  for (const py::handle each : proposals) {
    ProposalColumns columns;
    read_proposals(each, columns);
    calibration.correct(columns[0], columns.confidence(0));
    const Proposals found = columns[0];
    py::tuple confidence(found.count);
    for (int64_t i = 0; i < found.count; ++i) confidence[i] = py::float_(found.confidence[i]);
    corrected.append(
        named_tuple(value_classes.proposals, py::make_tuple(each[py::int_(0)], confidence, each[py::int_(2)])));
  }
  return corrected;
}

ProposalRows correct_rows(const Calibration& calibration, ProposalRows rows) {
  for (int64_t i = 0; i < rows.columns.size(); ++i) {
    calibration.correct(rows.columns[i], rows.columns.confidence(i));
  }
  return rows;
}

// What is kept of a state, by name.
template <typename State, typename Take>
void each_part(State& state, const Take& take) {
  take("weights", state.drafted.weights);
  take("covariance", state.drafted.covariance);
  take("labels", state.drafted_labels.count);
  take("_last", state.drafted_labels.last);
  take("_lately", state.drafted_labels.lately);
  take("_covered", state.covered);
  take("_missed", state.missed);
  take("retrieved_weights", state.retrieved.weights);
  take("retrieved_covariance", state.retrieved.covariance);
  take("retrieved_labels", state.retrieved_labels.count);
  take("_retrieved_last", state.retrieved_labels.last);
  take("_retrieved_lately", state.retrieved_labels.lately);
}

py::dict state_of(const Calibration& calibration) {
  py::dict found;
  each_part(calibration.state, [&](const char* name, const auto& value) { found[name] = value; });
  return found;
}

void restore(Calibration& calibration, const py::dict& given) {
  Calibration::State state = calibration.state;
  size_t known = 0;
  each_part(state, [&](const char* name, auto& value) {
    if (!given.contains(name)) return;
    try {
      value = given[name].cast<std::decay_t<decltype(value)>>();
    } catch (const py::cast_error&) {
      throw py::value_error(std::string("state: another shape or type of ") + name);
    }
    ++known;
  });
  if (known != given.size()) throw py::value_error("state: holds what no calibrator has learned");
  calibration.state = state;
}

}  // namespace

void bind_calibration(py::module_& m) {
  py::class_<Calibration>(m, "Calibrator")
      .def(py::init<>())
      .def("state", &state_of)
      .def("restore", &restore, "state"_a)
      .def("correct", &correct_rows, "proposals"_a)
      .def("correct", &correct, "proposals"_a)
      .def(
          "learn",
          [](Calibration& calibration, py::handle signals, bool accepted, bool covered) {
            calibration.learn(read_signals(signals), accepted, covered);
          },
          "signals"_a, "accepted"_a, "covered"_a)
      .def(
          "observe",
          [](Calibration& calibration, const PythonTree& tree, const Nodes& path, int64_t next_token) {
            calibration.observe(tree, path, next_token);
          },
          "tree"_a, "path"_a, "next_token"_a)
      .def("chances", &Calibration::chances, "found"_a)
      .def(
          "observe_retrieved",
          [](Calibration& calibration, const PythonTree& tree, const Nodes& path, int64_t next_token) {
            calibration.observe_retrieved(tree, path, next_token);
          },
          "tree"_a, "path"_a, "next_token"_a);
}

}  // namespace specbranch

// Choice, Proposals and Signals of core/tree.py, read and made without running Python code.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "tree/proposals.h"
#include "tree/tree.h"

namespace specbranch {

namespace py = pybind11;

// The three classes: named tuples, which core/tree.py hands over when it is imported.
struct ValueClasses {
  PyTypeObject *choice = nullptr, *proposals = nullptr, *signals = nullptr;
};
inline ValueClasses value_classes;

inline int64_t integer(py::handle object) {
  const int64_t value = PyLong_AsLongLong(object.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline double number(py::handle object) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// The items of any sequence. Reading a number may run Python code, which may change a list.
class Items {
 public:
  Items(py::handle sequence, const char* expected)
      : held_(py::reinterpret_steal<py::object>(PySequence_Fast(sequence.ptr(), expected))) {
    if (!held_) throw py::error_already_set();
    size_ = PySequence_Fast_GET_SIZE(held_.ptr());
  }

  int64_t size() const { return size_; }
  py::object operator[](int64_t i) const {
    if (i >= PySequence_Fast_GET_SIZE(held_.ptr())) throw py::index_error("a list became shorter while it was read");
    return py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(held_.ptr(), i));
  }

 private:
  py::object held_;
  int64_t size_;
};

inline void read_integers(py::handle sequence, std::vector<int64_t>& values) {
  const Items items(sequence, "expected a sequence of integers");
  values.resize(items.size());
  for (int64_t i = 0; i < items.size(); ++i) values[i] = integer(items[i]);
}

inline void read_numbers(py::handle sequence, std::vector<double>& values) {
  const Items items(sequence, "expected a sequence of numbers");
  values.resize(items.size());
  for (int64_t i = 0; i < items.size(); ++i) values[i] = number(items[i]);
}

// A named tuple of some items.
inline py::object named_tuple(PyTypeObject* type, const py::tuple& items) {
  if (!type) throw std::runtime_error("specbranch.core.tree is not imported");
  const py::tuple arguments = py::make_tuple(items);
  auto made = py::reinterpret_steal<py::object>(PyTuple_Type.tp_new(type, arguments.ptr(), nullptr));
  if (!made) throw py::error_already_set();
  return made;
}

inline py::object python_signals(const Signals& signals) {
  return named_tuple(value_classes.signals, py::make_tuple(signals.agreement, signals.entropy, signals.margin,
                                                           signals.depth, signals.forecast, signals.retrieved));
}

inline py::object python_proposals(const Proposals& proposals) {
  py::tuple tokens(proposals.count), confidence(proposals.count);
  for (int64_t i = 0; i < proposals.count; ++i) {
    tokens[i] = py::int_(proposals.tokens[i]);
    confidence[i] = py::float_(proposals.confidence[i]);
  }
  const py::object signals = proposals.signals ? python_signals(*proposals.signals) : py::none();
  return named_tuple(value_classes.proposals, py::make_tuple(std::move(tokens), std::move(confidence), signals));
}

inline Signals read_signals(py::handle object) {
  const Items items(object, "signals: expected a Signals");
  if (items.size() != 6) throw py::value_error("signals: expected a Signals");
  return {number(items[0]), number(items[1]), number(items[2]), integer(items[3]), number(items[4]), number(items[5])};
}

// Append one Proposals to some columns.
inline void read_proposals(py::handle object, ProposalColumns& columns) {
  const Items items(object, "proposals: expected a Proposals");
  if (items.size() != 3) throw py::value_error("proposals: expected a Proposals");
  const Items tokens(items[0], "tokens: expected a sequence"), confidence(items[1], "confidence: expected a sequence");
  if (tokens.size() != confidence.size()) {
    throw py::value_error("proposals: expected confidence in each of " + std::to_string(tokens.size()) +
                          " tokens, got " + std::to_string(confidence.size()));
  }
  const bool has_signals = !items[2].is_none();
  const Signals signals = has_signals ? read_signals(items[2]) : Signals{};
  for (int64_t i = 0; i < tokens.size(); ++i) columns.candidate(integer(tokens[i]), number(confidence[i]));
  if (has_signals) {
    columns.end(signals);
  } else {
    columns.end();
  }
}

}  // namespace specbranch

namespace pybind11::detail {

template <>
struct type_caster<specbranch::Choice> {
  PYBIND11_TYPE_CASTER(specbranch::Choice, const_name("Choice"));

  bool load(handle source, bool /*convert*/) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 2) return false;
    value = {specbranch::integer(PyTuple_GET_ITEM(source.ptr(), 0)),
             specbranch::integer(PyTuple_GET_ITEM(source.ptr(), 1))};
    return true;
  }

  static handle cast(specbranch::Choice choice, return_value_policy /*policy*/, handle /*parent*/) {
    return specbranch::named_tuple(specbranch::value_classes.choice, make_tuple(choice.node, choice.rank)).release();
  }
};

template <>
struct type_caster<specbranch::Outcome> {
  PYBIND11_TYPE_CASTER(specbranch::Outcome, const_name("tuple[float, Choice]"));

  static handle cast(const specbranch::Outcome& outcome, return_value_policy /*policy*/, handle /*parent*/) {
    return make_tuple(outcome.reach, outcome.choice).release();
  }
};

}  // namespace pybind11::detail

// The index of a text, and what followed earlier occurrences.
#include "planning/bindings.h"
#include "retrieval/continuations.h"
#include "retrieval/suffix_index.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace specbranch {
namespace {

using namespace py::literals;

struct Release {
  void operator()(Py_buffer* view) const {
    PyBuffer_Release(view);
    delete view;
  }
};
using View = std::unique_ptr<Py_buffer, Release>;

// The memory of an object that is a row of integers without gaps, of one of some sizes; else null.
View view_of(py::handle object, std::initializer_list<py::ssize_t> sizes) {
  if (!PyObject_CheckBuffer(object.ptr())) return nullptr;
  auto* made = new Py_buffer;
  if (PyObject_GetBuffer(object.ptr(), made, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) != 0) {
    delete made;
    PyErr_Clear();
    return nullptr;
  }
  View view(made);
  const char* format = view->format ? view->format : "B";
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  const bool integers = std::strlen(format) == 1 && std::strchr("ilq", *format);
  const bool fits = std::find(sizes.begin(), sizes.end(), view->itemsize) != sizes.end();
  return view->ndim == 1 && integers && fits ? std::move(view) : nullptr;
}

int32_t token_id(int64_t value, bool overflows, const char* name, py::handle object) {
  if (!overflows && value >= 0 && value <= SuffixIndex::LARGEST_TOKEN) return static_cast<int32_t>(value);
  throw py::value_error(std::string(name) + ": expected ids from 0 to " + std::to_string(SuffixIndex::LARGEST_TOKEN) +
                        ", got " + (object ? py::str(object).cast<std::string>() : std::to_string(value)));
}

// Token ids: of an array of 4 or 8 bytes each, or of any sequence; of more than `most`, the last ones.
std::vector<int32_t> read_tokens(py::handle given, const char* name, int64_t most = SuffixIndex::MOST_TOKENS + 1) {
  std::vector<int32_t> tokens;
  if (const View view = view_of(given, {4, 8})) {
    const int64_t size = view->shape[0];
    const auto read = [&](auto type) {
      const auto* values = static_cast<const decltype(type)*>(view->buf);
      for (int64_t i = std::max<int64_t>(0, size - most); i < size; ++i) {
        tokens.push_back(token_id(values[i], false, name, {}));
      }
    };
    tokens.reserve(std::min(size, most));
    if (view->itemsize == 4) {
      read(int32_t());
    } else {
      read(int64_t());
    }
    return tokens;
  }
  const Items items(given, "expected a sequence of token ids");
  tokens.reserve(std::min(items.size(), most));
  for (int64_t i = std::max<int64_t>(0, items.size() - most); i < items.size(); ++i) {
    const py::object item = items[i];
    int overflows = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(item.ptr(), &overflows);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    tokens.push_back(token_id(value, overflows != 0, name, item));
  }
  return tokens;
}

// The index for Python: with the memory that it is mapped over, and a count of the views of its own.
struct PythonSuffixIndex : SuffixIndex {
  explicit PythonSuffixIndex(std::vector<int32_t> tokens) : SuffixIndex(std::move(tokens)) {}
  PythonSuffixIndex(View tokens, View order)
      : SuffixIndex(static_cast<const int32_t*>(tokens->buf), static_cast<const int32_t*>(order->buf),
                    tokens->shape[0]),
        held{std::move(tokens), std::move(order)} {}

  View held[2];
  int64_t views = 0;
};

std::unique_ptr<PythonSuffixIndex> build(py::handle tokens) {
  std::vector<int32_t> read = read_tokens(tokens, "tokens");
  const py::gil_scoped_release released;
  return std::make_unique<PythonSuffixIndex>(std::move(read));
}

std::unique_ptr<PythonSuffixIndex> mapped(py::handle tokens, py::handle order) {
  const auto view = [](py::handle given, const char* name) {
    View found = view_of(given, {4});
    if (!found) throw py::value_error(std::string(name) + ": expected a contiguous buffer of int32, in one dimension");
    if (found->shape[0] > SuffixIndex::MOST_TOKENS) {
      throw py::value_error(std::string(name) + ": expected at most " + std::to_string(SuffixIndex::MOST_TOKENS));
    }
    return found;
  };
  View of_tokens = view(tokens, "tokens"), of_order = view(order, "order");
  if (of_tokens->shape[0] != of_order->shape[0]) {
    throw py::value_error("order: expected a position for each of " + std::to_string(of_tokens->shape[0]) +
                          " tokens, got " + std::to_string(of_order->shape[0]));
  }
  return std::make_unique<PythonSuffixIndex>(std::move(of_tokens), std::move(of_order));
}

void extend(PythonSuffixIndex& index, py::handle tokens) {
  const std::vector<int32_t> read = read_tokens(tokens, "tokens");  // may run Python code, so it comes first
  if (index.views > 0) throw py::buffer_error("extend: a view of the index's tokens or order is still in use");
  index.extend(read);
}

// One of an index's columns, as whoever wants to read its memory sees it. It keeps the index, and is counted by it.
struct Column {
  explicit Column(py::object of, bool order)
      : held(std::move(of)), index(held.cast<PythonSuffixIndex&>()), of_order(order) {}

  py::object held;
  PythonSuffixIndex& index;
  bool of_order;
  py::ssize_t size = 0, stride = sizeof(int32_t);
};

int get_buffer(PyObject* object, Py_buffer* view, int flags) {
  auto& column = py::handle(object).cast<Column&>();
  if ((flags & PyBUF_WRITABLE) == PyBUF_WRITABLE) {
    PyErr_SetString(PyExc_BufferError, "an index's tokens and order are to be read only");
    view->obj = nullptr;
    return -1;
  }
  PythonSuffixIndex& index = column.index;
  // No view can be there of what a merge moves: while there are views nothing is added, and one of the order merges first.
  try {
    if (column.of_order) index.merge();
  } catch (const std::bad_alloc&) {
    view->obj = nullptr;
    PyErr_NoMemory();
    return -1;
  }
  static int32_t none;  // of an index without tokens: a view has an address
  const int32_t* data = column.of_order ? index.order() : index.tokens();
  column.size = index.size();
  view->buf = const_cast<int32_t*>(data ? data : &none);
  view->obj = Py_NewRef(object);
  view->len = column.size * column.stride;
  view->readonly = 1;
  view->itemsize = column.stride;
  view->format = (flags & PyBUF_FORMAT) == PyBUF_FORMAT ? const_cast<char*>("i") : nullptr;
  view->ndim = 1;
  view->shape = (flags & PyBUF_ND) == PyBUF_ND ? &column.size : nullptr;
  view->strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? &column.stride : nullptr;
  view->suboffsets = nullptr;
  view->internal = &column;
  ++index.views;
  return 0;
}

void release_buffer(PyObject* /*object*/, Py_buffer* view) { --static_cast<Column*>(view->internal)->index.views; }

void be_a_buffer(PyHeapTypeObject* type) {
  type->as_buffer = {get_buffer, release_buffer};
  type->ht_type.tp_as_buffer = &type->as_buffer;
}

template <bool OF_ORDER>
py::memoryview column(const py::object& index) {
  return py::memoryview(py::cast(std::make_unique<Column>(index, OF_ORDER)));
}

Continuations look_up(const py::sequence& indexes, py::handle context, int64_t drafted, int64_t occurrences,
                      int64_t depth, int64_t least_match, int64_t most_nodes,
                      const std::optional<std::array<int64_t, 3>>& near) {
  // Reading the arguments may run Python code, which may extend an index: it is done when the look-up begins.
  const std::vector<int32_t> tokens = read_tokens(context, "context", std::max(drafted, SuffixIndex::DEPTH));
  std::vector<py::object> held;
  std::vector<const SuffixIndex*> all;
  for (const py::handle index : indexes) {
    if (!py::isinstance<PythonSuffixIndex>(index))
      throw py::type_error("indexes: expected a SuffixIndex in each place");
    held.push_back(py::reinterpret_borrow<py::object>(index));
    all.push_back(&index.cast<const PythonSuffixIndex&>());
  }
  const Near where = near ? Near{(*near)[0], (*near)[1], (*near)[2]} : Near{};
  return continuations(all, tokens, drafted, {occurrences, depth, least_match, most_nodes}, where);
}

}  // namespace

void bind_retrieval(py::module_& m) {
  py::class_<PythonSuffixIndex>(m, "SuffixIndex")
      .def(py::init(&build), "tokens"_a = py::tuple())
      .def_static("mapped", &mapped, "tokens"_a, "order"_a)
      .def("__len__", &SuffixIndex::size)
      .def_property_readonly("tokens", &column<false>)
      .def_property_readonly("order", &column<true>)
      .def("extend", &extend, "tokens"_a)
      .def("check", &SuffixIndex::check);
  const py::class_<Column> columns(m, "SuffixIndexColumn", py::custom_type_setup(&be_a_buffer));
  py::class_<Continuations>(m, "Continuations")
      .def("__len__", &Continuations::size)
      .def_readonly("token", &Continuations::token)
      .def_readonly("parent", &Continuations::parent)
      .def_readonly("match", &Continuations::match)
      .def_readonly("count", &Continuations::count)
      .def_readonly("total", &Continuations::total)
      .def_readonly("source", &Continuations::source)
      .def_readonly("position", &Continuations::position)
      .def_readonly("near", &Continuations::near);
  const ContinuationLimits limits;
  m.def("continuations", &look_up, "indexes"_a, "context"_a, "drafted"_a = 0, py::kw_only(),
        "occurrences"_a = limits.occurrences, "depth"_a = limits.depth, "least_match"_a = limits.least_match,
        "most_nodes"_a = limits.most_nodes, "near"_a = py::none());
}

}  // namespace specbranch

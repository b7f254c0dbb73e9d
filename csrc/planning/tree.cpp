// The tree.
#include <algorithm>
#include <optional>
#include <vector>

#include "planning/bindings.h"
#include "tree/tree.h"

namespace specbranch {
namespace {

using namespace py::literals;

// Columns whose items change: what Python sees of each is made when it is asked for.
template <typename Get>
struct ColumnView {
  py::object owner;
  const Tree* tree;

  py::object item(int64_t node) const { return Get()(*tree, node < 0 ? node + tree->size() : node); }
  py::list items() const {
    py::list all(tree->size());
    for (int64_t i = 0; i < tree->size(); ++i) all[i] = item(i);
    return all;
  }
};

struct ProposalsAt {
  py::object operator()(const Tree& tree, int64_t node) const {
    const std::optional<Proposals> proposals = tree.proposals(node);
    return proposals ? python_proposals(*proposals) : py::none();
  }
};

struct ChildrenAt {
  py::object operator()(const Tree& tree, int64_t node) const { return py::cast(tree.children(node)); }
};

template <typename Get>
void bind_view(py::module_& m, const char* name) {
  using View = ColumnView<Get>;
  py::class_<View>(m, name)
      .def("__len__", [](const View& view) { return view.tree->size(); })
      .def("__getitem__", &View::item)
      .def("__iter__", [](const View& view) { return py::iter(view.items()); })
      .def("__eq__", [](const View& view, const View& other) { return view.items().equal(other.items()); })
      .def("__eq__", [](const View& view, const py::list& other) { return view.items().equal(other); })
      .def("__repr__", [](const View& view) { return py::repr(view.items()); });
}

template <typename Get>
ColumnView<Get> view_of(const py::object& tree) {
  return {tree, &tree.cast<const PythonTree&>()};
}

// Of a run over some nodes, as a list for each step.
ProposalRows read_rows(const py::sequence& steps, const Nodes& nodes) {
  ProposalRows rows;
  rows.nodes = static_cast<int64_t>(nodes.size());
  for (const py::handle step : steps) {
    const Items each(step, "proposals: expected a sequence for each step");
    check_step(each.size(), rows.nodes);
    for (int64_t i = 0; i < each.size(); ++i) read_proposals(each[i], rows.columns);
  }
  return rows;
}

}  // namespace

void bind_tree(py::module_& m) {
  bind_view<ProposalsAt>(m, "ProposalsColumn");
  bind_view<ChildrenAt>(m, "ChildrenColumn");
  py::class_<PythonTree>(m, "Tree")
      .def(py::init<int64_t, int64_t>(), "token"_a, "position"_a)
      .def("__len__", &Tree::size)
      .def_property_readonly("position", &Tree::position)
      .def_property_readonly("token", [](PythonTree& tree) { return tree.column(&Tree::Node::token); })
      .def_property_readonly("parent", [](PythonTree& tree) { return tree.column(&Tree::Node::parent); })
      .def_property_readonly("depth", [](PythonTree& tree) { return tree.column(&Tree::Node::depth); })
      .def_property_readonly("reach", [](PythonTree& tree) { return tree.column(&Tree::Node::reach); })
      .def_property_readonly("proposals", &view_of<ProposalsAt>)
      .def_property_readonly("children", &view_of<ChildrenAt>)
      .def("add", &Tree::add, "parent"_a, "token"_a, "reach"_a, "free"_a = false)
      .def("force", &Tree::force, "node"_a, "tokens"_a)
      .def("take", &Tree::take, "choice"_a)
      .def("take_all", &Tree::take_all, "choices"_a)
      .def(
          "note",
          [](PythonTree& tree, int64_t node, py::handle proposals) {
            ProposalColumns columns;
            read_proposals(proposals, columns);
            tree.note(node, columns[0]);
          },
          "node"_a, "proposals"_a)
      .def("descend", &Tree::descend, "nodes"_a, "proposals"_a)
      .def(
          "descend",
          [](PythonTree& tree, const Nodes& nodes, const py::sequence& proposals) {
            return tree.descend(nodes, read_rows(proposals, nodes));
          },
          "nodes"_a, "proposals"_a)
      .def("branch", &Tree::branch, "node"_a, "width"_a)
      .def("graft", &Tree::graft, "node"_a, "found"_a, "chances"_a, "least"_a)
      .def("use", &Tree::use, "nodes"_a)
      .def(
          "adopt",
          [](PythonTree& tree, const PythonTree& other, int64_t node) {
            py::dict kept;
            for (const auto& [old, now] : tree.adopt(other, node)) kept[py::int_(old)] = now;
            return kept;
          },
          "other"_a, "node"_a)
      .def(
          "tokens",
          [](const PythonTree& tree, const Nodes& nodes) {
            Nodes tokens;
            for (const int64_t node : nodes) tokens.push_back(tree.node(node).token);
            return tokens;
          },
          "nodes"_a)
      .def("child", &Tree::child, "node"_a, "token"_a)
      .def("path", &Tree::path, "node"_a)
      .def("best_path", &Tree::best_path, "start"_a = 0)
      .def("best_choices", &Tree::best_choices, "start"_a = 0)
      .def("below", &Tree::below, "node"_a)
      .def("free_nodes", &Tree::free_nodes)
      .def("read", &Tree::read, "path"_a)
      .def("with_unread", &Tree::with_unread, "choices"_a)
      .def("retrieved_odds", &Tree::retrieved_odds, "node"_a, "token"_a)
      .def("relate", &Tree::relate, "proposals"_a, "nodes"_a)
      .def(
          "retrieved", [](const PythonTree& tree, int64_t node) { return tree.retrieved(node) != nullptr; }, "node"_a)
      .def(
          "forced", [](const PythonTree& tree, int64_t node) { return tree.node(node).forced; }, "node"_a)
      .def("is_bound", &Tree::is_bound, "node"_a)
      .def("depth_of", &Tree::depth_of, "choice"_a)
      .def("reach_of", &Tree::reach_of, "choice"_a)
      .def("chance_of", &Tree::chance_of, "choice"_a)
      .def(
          "deepest",
          [](const PythonTree& tree, const Choices& choices) {
            int64_t deepest = 0;
            for (const Choice& choice : choices) deepest = std::max(deepest, tree.depth_of(choice));
            return deepest;
          },
          "choices"_a)
      .def(
          "reaches",
          [](const PythonTree& tree, const Choices& choices) {
            std::vector<double> reaches;
            for (const Choice& choice : choices) reaches.push_back(tree.reach_of(choice));
            return reaches;
          },
          "choices"_a)
      .def(
          "chances",
          [](const PythonTree& tree, const Choices& choices) {
            std::vector<double> chances;
            for (const Choice& choice : choices) chances.push_back(tree.chance_of(choice));
            return chances;
          },
          "choices"_a)
      .def("untried", &Tree::untried, "node"_a, "ranks"_a)
      .def("undrafted", &Tree::undrafted, "depth"_a)
      .def("offers", &Tree::offers, "node"_a, "ranks"_a, "least"_a)
      .def("likeliest", &Tree::likeliest, "count"_a, "depth"_a, "ranks"_a);
}

}  // namespace specbranch

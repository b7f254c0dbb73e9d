// What the module binds, by concept, and the tree that Python sees.
#pragma once

#include <pybind11/pybind11.h>

#include "planning/values.h"
#include "tree/tree.h"

namespace specbranch {

// The tree for Python. Columns are lists, which grow when they are asked for; that of reaches is made anew after some have
// changed.
class PythonTree : public Tree {
 public:
  using Tree::Tree;

  template <typename T>
  const py::list& column(T Node::* member) {
    py::list& list = columns_[column_of(member)];
    if (column_of(member) == 3 && seen_ != revisions()) {
      list = py::list();
      seen_ = revisions();
    }
    for (auto i = static_cast<int64_t>(list.size()); i < size(); ++i) list.append(node(i).*member);
    return list;
  }

 private:
  static int column_of(int64_t Node::* member) { return member == &Node::token ? 0 : member == &Node::parent ? 1 : 2; }
  static int column_of(double Node::* /*reach*/) { return 3; }

  py::list columns_[4];
  int64_t seen_ = 0;  // revisions
};

void bind_proposals(py::module_& m);
void bind_tree(py::module_& m);
void bind_calibration(py::module_& m);
void bind_retrieval(py::module_& m);

}  // namespace specbranch

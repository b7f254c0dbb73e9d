// The speculation tree: drafted tokens below the last committed token, and the frontier of what could be drafted next.
// core/tree.py says what a tree is; tests/support/plain_tree.py defines every function in plain Python, with the same
// results, order and bits. No Python, no torch.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "tree/found.h"
#include "tree/proposals.h"

namespace specbranch {

// A node, or with a rank that candidate of the node.
struct Choice {
  int64_t node;
  int64_t rank = -1;
};

// A choice with its reach.
struct Outcome {
  double reach;
  Choice choice;
};

using Nodes = std::vector<int64_t>;
using Choices = std::vector<Choice>;
using Outcomes = std::vector<Outcome>;

// Of a draft's run: as many proposals in a step as there are nodes. Raises std::invalid_argument.
void check_step(int64_t proposals, int64_t nodes);

// A node that is none raises std::out_of_range, as does a rank that no candidate has; a node without proposals where
// some are needed std::invalid_argument.
class Tree {
 public:
  struct Node {
    int64_t token, parent, depth;
    double reach;
    int64_t first_child = -1, last_child = -1, next_sibling = -1;
    int64_t proposals = -1;  // their place in the columns
    int64_t offered = 1;     // the highest rank in the frontier
    int64_t found = -1;      // of a retrieved one: its place in what was found
    bool free = false;       // one that no draft proposed and no model has run over
    bool forced = false;     // nothing else can follow its parent
  };

  // What speaks for a retrieved node, and the chance that followed from it.
  struct Retrieved {
    Found found;
    double chance;
  };

  Tree(int64_t token, int64_t position);

  int64_t position() const { return position_; }
  int64_t size() const { return static_cast<int64_t>(nodes_.size()); }
  const Node& node(int64_t index) const;
  // How often the reach of nodes that were there has changed.
  int64_t revisions() const { return revisions_; }
  std::optional<Proposals> proposals(int64_t node) const;
  // Null where the node was not retrieved.
  const Retrieved* retrieved(int64_t node) const;
  // Whether nothing but one of its children can follow a node.
  bool is_bound(int64_t node) const;

  // ---- Growing
  int64_t add(int64_t parent, int64_t token, double reach, bool free = false);
  // Add the tokens that must follow a node, one behind the other; returns the last node.
  int64_t force(int64_t node, const std::vector<int64_t>& tokens);
  int64_t take(Choice choice);
  Nodes take_all(const Choices& choices);
  void note(int64_t node, const Proposals& proposals);
  Nodes descend(const Nodes& nodes, const ProposalRows& rows);
  void branch(int64_t node, int64_t width);
  // Returns how many nodes there are more.
  int64_t graft(int64_t node, const Continuations& found, const std::vector<double>& chances, double least);
  // A model is to run over them. Returns how many were free until now.
  int64_t use(const Nodes& nodes);
  // Of a tree with a root only: become the subtree at a node of another tree. Returns the old and the new index of every
  // node that survives.
  std::vector<std::pair<int64_t, int64_t>> adopt(const Tree& other, int64_t node);

  // ---- Asking
  std::optional<int64_t> child(int64_t node, int64_t token) const;
  Nodes children(int64_t node) const;
  Nodes path(int64_t node) const;
  Nodes best_path(int64_t start) const;
  Choices best_choices(int64_t start) const;
  Nodes below(int64_t node) const;
  Nodes free_nodes() const;
  Choices with_unread(const Choices& choices) const;
  int64_t read(const Choices& path) const;
  // Log-odds that what was retrieved after a node gives to a token, as far as they are worth more than none; those of
  // another token speak against it. 0 where nothing was retrieved.
  double retrieved_odds(int64_t node, int64_t token) const;
  // Let the first step of a draft's run over some nodes say what was retrieved there.
  void relate(ProposalRows& rows, const Nodes& nodes) const;
  int64_t depth_of(Choice choice) const;
  double reach_of(Choice choice) const;
  double chance_of(Choice choice) const;
  Outcomes untried(int64_t node, int64_t ranks) const;
  Outcomes undrafted(int64_t depth) const;
  Outcomes offers(int64_t node, int64_t ranks, double least) const;
  Outcomes likeliest(int64_t count, int64_t depth, int64_t ranks);

 private:
  struct Entry {
    double cost;  // -reach
    int64_t node, rank;
  };
  static bool later(const Entry& a, const Entry& b);

  Node& at(int64_t index);
  Proposals proposed(int64_t node) const;
  int64_t candidate(int64_t node, int64_t rank) const;
  bool is_child(int64_t node, int64_t rank) const;
  int64_t likeliest_child(int64_t node) const;
  double chance_after(int64_t node, int64_t token, double chance) const;
  void keep(int64_t node, const Proposals& proposals);
  void scale(int64_t node, double factor);
  double cost_of(const Entry& entry) const;
  void offer(int64_t node, int64_t rank);
  void push(const Entry& entry);
  Entry pop();

  int64_t position_;
  int64_t revisions_ = 0;
  std::vector<Node> nodes_;
  ProposalColumns proposals_;
  std::vector<Retrieved> retrieved_;
  std::vector<Entry> frontier_;  // a heap
};

}  // namespace specbranch

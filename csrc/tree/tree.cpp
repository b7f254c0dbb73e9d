#include "tree/tree.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace specbranch {

void check_step(int64_t proposals, int64_t nodes) {
  if (proposals == nodes) return;
  throw std::invalid_argument("proposals: expected " + std::to_string(nodes) +
                              " in each step, one for each node, got " + std::to_string(proposals));
}

Tree::Tree(int64_t token, int64_t position) : position_(position) {
  nodes_.push_back({token, -1, 0, 1.0});
  frontier_.push_back({-1.0, 0, -1});
}

const Tree::Node& Tree::node(int64_t index) const {
  if (index < 0 || index >= size()) {
    throw std::out_of_range("node " + std::to_string(index) + ": the tree has " + std::to_string(size()) + " nodes");
  }
  return nodes_[index];
}

Tree::Node& Tree::at(int64_t index) { return const_cast<Node&>(node(index)); }

std::optional<Proposals> Tree::proposals(int64_t node) const {
  const int64_t place = this->node(node).proposals;
  if (place < 0) return std::nullopt;
  return proposals_[place];
}

const Tree::Retrieved* Tree::retrieved(int64_t node) const {
  const int64_t place = this->node(node).found;
  return place < 0 ? nullptr : &retrieved_[place];
}

bool Tree::is_bound(int64_t node) const {
  for (int64_t child = this->node(node).first_child; child >= 0; child = nodes_[child].next_sibling) {
    if (nodes_[child].forced) return true;
  }
  return false;
}

Proposals Tree::proposed(int64_t node) const {
  const std::optional<Proposals> found = proposals(node);
  if (!found) {
    throw std::invalid_argument("node " + std::to_string(node) +
                                " has no proposals yet: the draft has not run over it");
  }
  return *found;
}

// ---- Growing

int64_t Tree::add(int64_t parent, int64_t token, double reach, bool free) {
  const int64_t index = size();
  Node& above = at(parent);
  if (above.first_child < 0) {
    above.first_child = index;
  } else {
    nodes_[above.last_child].next_sibling = index;
  }
  above.last_child = index;
  const int64_t depth = above.depth + 1;  // `above` does not outlive the next line
  nodes_.push_back({token, parent, depth, reach});
  nodes_.back().free = free;
  push({-reach, index, -1});
  return index;
}

int64_t Tree::force(int64_t node, const std::vector<int64_t>& tokens) {
  static_cast<void>(this->node(node));
  for (const int64_t token : tokens) {
    const double reach = nodes_[node].reach;
    if (const std::optional<int64_t> known = child(node, token)) {
      node = *known;
      if (nodes_[node].reach > 0) scale(node, reach / nodes_[node].reach);
    } else {
      node = add(node, token, reach, /*free=*/true);
    }
    nodes_[node].forced = true;
  }
  return node;
}

int64_t Tree::take(Choice choice) {
  if (choice.rank < 0) {
    static_cast<void>(node(choice.node));
    return choice.node;
  }
  const int64_t token = candidate(choice.node, choice.rank);
  return add(choice.node, token, reach_of(choice));
}

Nodes Tree::take_all(const Choices& choices) {
  Nodes nodes;
  for (const Choice& choice : choices) nodes.push_back(take(choice));
  return nodes;
}

void Tree::note(int64_t node, const Proposals& proposals) {
  keep(node, proposals);
  for (const int64_t child : children(node)) {
    const Retrieved* retrieved = this->retrieved(child);
    if (!retrieved || nodes_[child].forced) continue;
    const double reach = nodes_[node].reach * chance_after(node, nodes_[child].token, retrieved->chance);
    if (nodes_[child].reach > 0) scale(child, reach / nodes_[child].reach);
  }
}

void Tree::keep(int64_t node, const Proposals& proposals) {
  at(node).proposals = proposals_.size();  // before the columns grow: this checks the node
  proposals_.add(proposals);
  const int64_t first = std::min<int64_t>(2, proposals.count);
  for (int64_t rank = 0; rank < first; ++rank) offer(node, rank);
}

Nodes Tree::descend(const Nodes& nodes, const ProposalRows& rows) {
  const auto width = static_cast<int64_t>(nodes.size());
  if (rows.steps()) check_step(rows.nodes, width);
  Nodes below = nodes, everywhere = nodes;
  for (int64_t step = 0; step < rows.steps(); ++step) {
    if (step) {
      for (int64_t& node : below) node = take({node, 0});
      everywhere.insert(everywhere.end(), below.begin(), below.end());
    }
    for (int64_t i = 0; i < width; ++i) note(below[i], rows.columns[step * width + i]);
  }
  return everywhere;
}

void Tree::branch(int64_t node, int64_t width) {
  const int64_t ranks = std::min(width, proposed(node).count);
  for (int64_t rank = 0; rank < ranks; ++rank) {
    if (!is_child(node, rank)) take({node, rank});
  }
}

int64_t Tree::graft(int64_t node, const Continuations& found, const std::vector<double>& chances, double least) {
  static_cast<void>(this->node(node));
  if (static_cast<int64_t>(chances.size()) != found.size()) {
    throw std::invalid_argument("chances: expected one for each of " + std::to_string(found.size()) +
                                " tokens that were found, got " + std::to_string(chances.size()));
  }
  const int64_t before = size();
  Nodes place(found.size(), -1);
  for (int64_t i = 0; i < found.size(); ++i) {
    const int64_t above = found.parent[i] < 0 ? node : place[found.parent[i]];
    if (above < 0) continue;
    if (const std::optional<int64_t> known = child(above, found.token[i])) {
      place[i] = *known;
      continue;
    }
    const double reach = nodes_[above].reach * chance_after(above, found.token[i], chances[i]);
    if (!(reach >= least)) continue;
    place[i] = add(above, found.token[i], reach, /*free=*/true);
    nodes_[place[i]].found = static_cast<int64_t>(retrieved_.size());
    retrieved_.push_back({found_at(found, i), chances[i]});
  }
  return size() - before;
}

int64_t Tree::use(const Nodes& nodes) {
  int64_t fresh = 0;
  for (const int64_t node : nodes) {
    fresh += at(node).free;
    at(node).free = false;
  }
  return fresh;
}

// The chance that `token` follows a node, where `chance` was said of it before the draft ran over the node: what the
// draft says, and if it does not name the token, that it is wrong.
double Tree::chance_after(int64_t node, int64_t token, double chance) const {
  const std::optional<Proposals> proposals = this->proposals(node);
  if (!proposals) return chance;
  double named = 0;
  for (int64_t rank = 0; rank < proposals->count; ++rank) {
    if (proposals->tokens[rank] == token) return proposals->confidence[rank];
    named += proposals->confidence[rank];
  }
  return chance * std::max(0.0, 1 - named);
}

// Another reach for all that is below a node, and for the node.
void Tree::scale(int64_t node, double factor) {
  if (factor == 1) return;
  ++revisions_;
  for (const int64_t each : below(node)) {
    nodes_[each].reach *= factor;
    push({-nodes_[each].reach, each, -1});  // what is in the frontier for the reach before is stale
    if (nodes_[each].proposals < 0) continue;
    for (int64_t rank = 0; rank <= nodes_[each].offered; ++rank) offer(each, rank);
  }
}

std::vector<std::pair<int64_t, int64_t>> Tree::adopt(const Tree& other, int64_t node) {
  if (size() != 1) throw std::invalid_argument("expected a tree with a root only");
  const Node& root = other.node(node);
  const double top = root.reach;
  position_ = other.position_ + root.depth;
  nodes_[0].token = root.token;
  std::vector<std::pair<int64_t, int64_t>> kept;
  Nodes place(other.size(), -1);
  for (const int64_t old : other.below(node)) {
    const Node& found = other.nodes_[old];
    if (!kept.empty()) {
      const int64_t now = add(place[found.parent], found.token, top > 0 ? found.reach / top : 1.0, found.free);
      nodes_[now].forced = found.forced;
      if (found.found >= 0) {
        nodes_[now].found = static_cast<int64_t>(retrieved_.size());
        retrieved_.push_back(other.retrieved_[found.found]);
      }
    }
    place[old] = static_cast<int64_t>(kept.size());
    kept.emplace_back(old, place[old]);
  }
  for (const auto& [old, now] : kept) {
    if (const std::optional<Proposals> proposals = other.proposals(old)) keep(now, *proposals);
  }
  return kept;
}

// ---- Asking

std::optional<int64_t> Tree::child(int64_t node, int64_t token) const {
  for (int64_t child = this->node(node).first_child; child >= 0; child = nodes_[child].next_sibling) {
    if (nodes_[child].token == token) return child;
  }
  return std::nullopt;
}

Nodes Tree::children(int64_t node) const {
  Nodes found;
  for (int64_t child = this->node(node).first_child; child >= 0; child = nodes_[child].next_sibling) {
    found.push_back(child);
  }
  return found;
}

Nodes Tree::path(int64_t node) const {
  Nodes path(this->node(node).depth + 1);
  for (int64_t depth = nodes_[node].depth; depth >= 0; --depth, node = nodes_[node].parent) path[depth] = node;
  return path;
}

// The first of the likeliest ones; -1 without children.
int64_t Tree::likeliest_child(int64_t node) const {
  int64_t best = this->node(node).first_child;
  for (int64_t child = best; child >= 0; child = nodes_[child].next_sibling) {
    if (nodes_[child].reach > nodes_[best].reach) best = child;
  }
  return best;
}

Nodes Tree::best_path(int64_t start) const {
  static_cast<void>(node(start));
  Nodes path;
  for (int64_t node = start; node >= 0; node = likeliest_child(node)) path.push_back(node);
  return path;
}

Choices Tree::best_choices(int64_t start) const {
  static_cast<void>(node(start));
  Choices path;
  for (int64_t node = start; node >= 0;) {
    path.push_back({node});
    const int64_t child = likeliest_child(node);
    if (nodes_[node].proposals >= 0 && proposed(node).count && !is_child(node, 0) &&
        (child < 0 || reach_of({node, 0}) > nodes_[child].reach)) {
      path.push_back({node, 0});
      break;
    }
    node = child;
  }
  return path;
}

Nodes Tree::below(int64_t node) const {
  static_cast<void>(this->node(node));
  Nodes members{node};
  std::vector<bool> inside(size());
  inside[node] = true;
  for (int64_t i = node + 1; i < size(); ++i) {  // parents come first
    inside[i] = inside[nodes_[i].parent];
    if (inside[i]) members.push_back(i);
  }
  return members;
}

Nodes Tree::free_nodes() const {
  Nodes found;
  for (int64_t i = 0; i < size(); ++i) {
    if (nodes_[i].free) found.push_back(i);
  }
  return found;
}

int64_t Tree::read(const Choices& path) const {
  int64_t count = 0;
  while (count < static_cast<int64_t>(path.size()) && path[count].rank < 0 && node(path[count].node).proposals >= 0) {
    ++count;
  }
  return count;
}

Choices Tree::with_unread(const Choices& choices) const {
  Choices all;
  std::vector<bool> taken(size());
  for (const Choice& choice : choices) {
    Choices above;
    for (int64_t node = this->node(choice.node).parent; node >= 0 && nodes_[node].proposals < 0 && !taken[node];
         node = nodes_[node].parent) {
      above.push_back({node});
      taken[node] = true;
    }
    all.insert(all.end(), above.rbegin(), above.rend());
    if (choice.rank < 0) {
      if (taken[choice.node]) continue;
      taken[choice.node] = true;
    }
    all.push_back(choice);
  }
  return all;
}

double Tree::retrieved_odds(int64_t node, int64_t token) const {
  const Retrieved* best = nullptr;
  bool same = false;
  for (const int64_t child : children(node)) {
    const Retrieved* retrieved = this->retrieved(child);
    if (!retrieved || (best && !(retrieved->chance > best->chance))) continue;
    best = retrieved;
    same = nodes_[child].token == token;
  }
  if (!best) return 0;
  const double chance = std::clamp(best->chance, 0.02, 0.98);
  const double odds = std::log(chance / (1 - chance));
  return same ? odds + 1 : -odds - 1;
}

void Tree::relate(ProposalRows& rows, const Nodes& nodes) const {
  if (rows.steps()) check_step(rows.nodes, static_cast<int64_t>(nodes.size()));
  for (int64_t i = 0; rows.steps() && i < rows.nodes; ++i) {
    Signals* signals = rows.columns.signals(i);
    if (signals && rows.columns[i].count) signals->retrieved = retrieved_odds(nodes[i], rows.columns[i].tokens[0]);
  }
}

int64_t Tree::depth_of(Choice choice) const { return node(choice.node).depth + (choice.rank >= 0); }

double Tree::reach_of(Choice choice) const {
  const double reach = node(choice.node).reach;
  if (choice.rank < 0) return reach;
  static_cast<void>(candidate(choice.node, choice.rank));
  return reach * proposed(choice.node).confidence[choice.rank];
}

double Tree::chance_of(Choice choice) const {
  const int64_t parent = choice.rank < 0 ? node(choice.node).parent : choice.node;
  const double above = parent < 0 ? 1.0 : node(parent).reach;
  return above > 0 ? reach_of(choice) / above : 0.0;
}

Outcomes Tree::untried(int64_t node, int64_t ranks) const {
  Outcomes found;
  const std::optional<Proposals> proposals = this->proposals(node);
  if (!proposals) return found;
  for (int64_t rank = 0; rank < std::min(ranks, proposals->count); ++rank) {
    if (!child(node, proposals->tokens[rank])) {
      found.push_back({nodes_[node].reach * proposals->confidence[rank], {node, rank}});
    }
  }
  return found;
}

Outcomes Tree::undrafted(int64_t depth) const {
  Outcomes found;
  for (int64_t i = 0; i < size(); ++i) {
    if (nodes_[i].proposals < 0 && nodes_[i].depth < depth) found.push_back({nodes_[i].reach, {i}});
  }
  return found;
}

Outcomes Tree::offers(int64_t node, int64_t ranks, double least) const {
  Outcomes found;
  for (const int64_t child : children(node)) {
    if (nodes_[child].reach > least) found.push_back({nodes_[child].reach, {child}});
  }
  for (const Outcome& outcome : untried(node, ranks)) {
    if (outcome.reach > least) found.push_back(outcome);
  }
  return found;
}

// ---- The frontier

Outcomes Tree::likeliest(int64_t count, int64_t depth, int64_t ranks) {
  Outcomes found;
  std::vector<Entry> kept;
  while (!frontier_.empty() && static_cast<int64_t>(found.size()) < count) {
    const Entry entry = pop();
    if (entry.cost != cost_of(entry)) continue;  // of a reach that it had
    const auto same = [&](const Entry& other) { return other.node == entry.node && other.rank == entry.rank; };
    if (std::any_of(kept.rbegin(), kept.rend(), same)) continue;  // it was there twice
    bool stale;
    if (entry.rank < 0) {
      stale = nodes_[entry.node].proposals >= 0;
    } else {
      if (entry.rank == nodes_[entry.node].offered) {
        ++nodes_[entry.node].offered;
        offer(entry.node, entry.rank + 1);
      }
      stale = is_child(entry.node, entry.rank);
    }
    if (stale) continue;
    kept.push_back(entry);
    if (entry.rank < ranks && nodes_[entry.node].depth < depth)
      found.push_back({-entry.cost, {entry.node, entry.rank}});
  }
  for (const Entry& entry : kept) push(entry);
  return found;
}

// That an entry for the place would have now.
double Tree::cost_of(const Entry& entry) const {
  const Node& node = nodes_[entry.node];
  return entry.rank < 0 ? -node.reach : -(node.reach * proposed(entry.node).confidence[entry.rank]);
}

bool Tree::later(const Entry& a, const Entry& b) {
  if (a.cost != b.cost) return a.cost > b.cost;
  if (a.node != b.node) return a.node > b.node;
  return a.rank > b.rank;
}

// Put a candidate into the frontier, unless there is none or it cannot be reached.
void Tree::offer(int64_t node, int64_t rank) {
  const Proposals proposals = proposed(node);
  if (rank >= proposals.count) return;
  const double reach = nodes_[node].reach * proposals.confidence[rank];
  if (reach > 0) push({-reach, node, rank});
}

int64_t Tree::candidate(int64_t node, int64_t rank) const {
  const Proposals proposals = proposed(node);
  if (rank >= proposals.count) {
    throw std::out_of_range("rank " + std::to_string(rank) + ": node " + std::to_string(node) + " has " +
                            std::to_string(proposals.count) + " candidates");
  }
  return proposals.tokens[rank];
}

bool Tree::is_child(int64_t node, int64_t rank) const {
  return nodes_[node].first_child >= 0 && child(node, candidate(node, rank)).has_value();
}

void Tree::push(const Entry& entry) {
  frontier_.push_back(entry);
  std::push_heap(frontier_.begin(), frontier_.end(), later);
}

Tree::Entry Tree::pop() {
  std::pop_heap(frontier_.begin(), frontier_.end(), later);
  const Entry entry = frontier_.back();
  frontier_.pop_back();
  return entry;
}

}  // namespace specbranch

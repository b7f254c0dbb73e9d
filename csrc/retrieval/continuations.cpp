#include "retrieval/continuations.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace specbranch {
namespace {

struct Occurrence {
  int64_t match, index, position;
  bool near;

  bool operator<(const Occurrence& other) const {  // the better one
    if (near != other.near) return near;
    if (match != other.match) return match > other.match;
    if (index != other.index) return index < other.index;
    return position > other.position;
  }
};

void expect(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return;
  const std::string range =
      most == INT64_MAX ? "at least " + std::to_string(least) : std::to_string(least) + " to " + std::to_string(most);
  throw std::invalid_argument(std::string(name) + ": expected " + range + ", got " + std::to_string(value));
}

// Occurrences of the context's end in one index. following: how many of its positions have a next token.
void find(const SuffixIndex& index, int64_t place, int64_t following, const std::vector<int32_t>& context,
          const ContinuationLimits& limits, const Near& near, std::vector<Occurrence>& found) {
  const int32_t* end = context.data() + context.size() - 1;
  const int64_t most = std::min(static_cast<int64_t>(context.size()), SuffixIndex::DEPTH);
  const auto match_at = [&](int64_t position) {
    return common_end(index.tokens() + position, end, std::min(position + 1, most));
  };
  if (near.index == place) {
    for (int64_t position = std::max<int64_t>(0, near.first); position <= near.last && position < following;
         ++position) {
      if (const int64_t match = match_at(position); match >= limits.least_match) {
        found.push_back({match, place, position, true});
      }
    }
  }
  // Away from the context's own place in the order, matches only become shorter.
  const int64_t middle = index.place(end, most);
  const auto look = [&](int64_t entry, int64_t step) {
    for (int64_t left = limits.occurrences; left > 0 && entry >= 0 && entry < index.sorted(); entry += step) {
      const int64_t position = index.position(entry), match = match_at(position);
      if (match < limits.least_match) return;
      if (position >= following) continue;
      if (!near.has(place, position)) found.push_back({match, place, position, false});
      --left;
    }
  };
  look(middle - 1, -1);
  look(middle, 1);
  // The tail from its end: later positions come first among those that match as far as can be.
  int64_t full = 0;
  for (int64_t position = following - 1; position >= index.sorted() && full < limits.occurrences; --position) {
    if (index.tokens()[position] != *end) continue;
    const int64_t match = match_at(position);
    if (match >= limits.least_match && !near.has(place, position)) found.push_back({match, place, position, false});
    full += match == most;
  }
}

// Runs of tokens merged from their first tokens on.
class Trie {
 public:
  struct Node {
    int64_t token, source, position;
    int64_t match = 0, count = 0;
    bool near = false;
    int64_t first_child = -1, last_child = -1, next_sibling = -1;
  };

  explicit Trie(int64_t most_nodes) : most_(most_nodes + 1) { nodes_.push_back({-1, -1, -1}); }

  // Begin a run, then add its tokens one by one. Runs come best first, so the one that makes a node is its best.
  void begin() {
    at_ = 0;
    depth_ = 0;
    ++nodes_[0].count;
  }

  // Whether there is a node for it, or room for one.
  bool add(int64_t token, const Occurrence& occurrence) {
    int64_t child = nodes_[at_].first_child;
    while (child >= 0 && nodes_[child].token != token) child = nodes_[child].next_sibling;
    if (child < 0) {
      child = static_cast<int64_t>(nodes_.size());
      if (child == most_) return false;
      nodes_.push_back({token, occurrence.index, occurrence.position + 1 + depth_});
      Node& parent = nodes_[at_];
      (parent.first_child < 0 ? parent.first_child : nodes_[parent.last_child].next_sibling) = child;
      parent.last_child = child;
    }
    Node& node = nodes_[child];
    node.match = std::max(node.match, std::min(occurrence.match + depth_, SuffixIndex::DEPTH));
    node.near |= occurrence.near;
    ++node.count;
    at_ = child;
    ++depth_;
    return true;
  }

  Continuations columns() const {
    Continuations all;
    const size_t size = nodes_.size() - 1;
    for (auto* column :
         {&all.token, &all.parent, &all.match, &all.count, &all.total, &all.source, &all.position, &all.near}) {
      column->reserve(size);
    }
    std::vector<int64_t> places = {0}, children;  // level by level
    for (int64_t i = 0; i < static_cast<int64_t>(places.size()); ++i) {
      const Node& parent = nodes_[places[i]];
      children.clear();
      for (int64_t child = parent.first_child; child >= 0; child = nodes_[child].next_sibling) {
        children.push_back(child);
      }
      std::sort(children.begin(), children.end(), [&](int64_t a, int64_t b) {
        const Node &one = nodes_[a], &other = nodes_[b];
        if (one.near != other.near) return one.near;
        if (one.match != other.match) return one.match > other.match;
        if (one.count != other.count) return one.count > other.count;
        return a < b;
      });
      for (const int64_t child : children) {
        const Node& node = nodes_[child];
        all.token.push_back(node.token);
        all.parent.push_back(i - 1);
        all.match.push_back(node.match);
        all.count.push_back(node.count);
        all.total.push_back(parent.count);
        all.source.push_back(node.source);
        all.position.push_back(node.position);
        all.near.push_back(node.near);
        places.push_back(child);
      }
    }
    return all;
  }

 private:
  int64_t most_, at_ = 0, depth_ = 0;
  std::vector<Node> nodes_;  // the context's end first
};

}  // namespace

Continuations continuations(const std::vector<const SuffixIndex*>& indexes, const std::vector<int32_t>& context,
                            int64_t drafted, const ContinuationLimits& limits, const Near& near) {
  const auto length = static_cast<int64_t>(context.size());
  expect("drafted", drafted, 0, INT64_MAX);
  if (drafted > length) {
    throw std::invalid_argument("drafted: expected at most the " + std::to_string(length) + " tokens of context, got " +
                                std::to_string(drafted));
  }
  expect("occurrences", limits.occurrences, 1, INT64_MAX);
  expect("depth", limits.depth, 1, INT64_MAX);
  expect("least_match", limits.least_match, 1, SuffixIndex::DEPTH);
  expect("most_nodes", limits.most_nodes, 1, SuffixIndex::MOST_TOKENS);
  Trie trie(limits.most_nodes);
  if (length == 0) return trie.columns();

  std::vector<Occurrence> found;
  for (int64_t i = 0; i < static_cast<int64_t>(indexes.size()); ++i) {
    const SuffixIndex& index = *indexes[i];
    // Behind the text's last token stand the drafted ones, and its last position without any is the context itself.
    const int64_t following = i == 0 && drafted > 0 ? index.size() : index.size() - 1;
    find(index, i, following, context, limits, near, found);
  }
  const auto taken = std::min(static_cast<int64_t>(found.size()), limits.occurrences);
  std::partial_sort(found.begin(), found.begin() + taken, found.end());
  found.resize(taken);

  const int32_t* beyond = context.data() + (length - drafted);
  std::vector<int64_t> run;
  for (const Occurrence& occurrence : found) {
    const SuffixIndex& index = *indexes[occurrence.index];
    const int64_t begin = occurrence.position + 1, rest = index.size() - begin;
    trie.begin();
    run.clear();
    for (int64_t i = 0; i < limits.depth; ++i) {
      int64_t token;
      if (i < rest) {
        token = index.tokens()[begin + i];
        if (token < 0 || token > SuffixIndex::LARGEST_TOKEN) {
          throw std::invalid_argument("tokens: " + std::to_string(token) + " at " + std::to_string(begin + i) +
                                      " is no token id");
        }
      } else if (occurrence.index != 0) {
        break;
      } else if (i < rest + drafted) {
        token = beyond[i - rest];
      } else {  // what it has copied, as in LZ77
        token = run[i - rest - drafted];
      }
      if (!trie.add(token, occurrence)) break;
      if (occurrence.index == 0) run.push_back(token);
    }
  }
  return trie.columns();
}

}  // namespace specbranch

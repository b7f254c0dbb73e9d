// The walk down a speculation tree, by one block: which children equal their parent's target token is found by one
// thread for each child; the path is then followed by a warp, 32 children at a time (parents come before children).
// Each of several trees has a warp of its own.
#pragma once

#include "sampling/cuda/logit_row.h"
#include "sampling/filters.h"

namespace specbranch::cuda {

struct TreeArguments {
  int64_t n;
  bool has_roots;
  int64_t texts;
  const int64_t* roots;  // [texts]; without, the only root is node 0
  const int64_t* tokens;
  const int64_t* parents;
  int64_t* target_tokens;  // read; -1: a row that could not be sampled
  int64_t* path;
  int64_t* accepted;
  int64_t* next_token;
};

constexpr int64_t walk_cached = 1024;

struct WalkShared {
  int32_t target[walk_cached];  // trees up to here keep their target tokens close
  int32_t parent[walk_cached];  // of the children that equal their parent's target token, else -1
  bool unusable, ascending;
};

// By a warp: goes on from `node` to the rows, one for each lane from `first` on, that carry on the path. parent: of the
// lane's row if that equals its parent's target token.
__device__ inline void follow(int32_t parent, int64_t first, int64_t& node, int64_t& accepted, int64_t* path) {
  unsigned later = all_lanes;
  for (;;) {
    const unsigned next = __ballot_sync(all_lanes, parent == node) & later;
    if (next == 0) return;
    const int found = __ffs(static_cast<int>(next)) - 1;  // of equal siblings the first one
    node = first + found;
    later = found == warp_size - 1 ? 0u : all_lanes << (found + 1);
    if (lane_index() == 0) path[accepted] = node;
    ++accepted;
  }
}

// The walk down the only tree.
template <int threads>
__device__ void walk_tree(const TreeArguments& t, WalkShared& s) {
  static_assert(threads <= walk_cached, "a child for each thread");
  const int64_t thread = threadIdx.x;
  const bool cached = t.n <= walk_cached;
  // Independent loads, so that they overlap.
  int64_t token = thread < t.n ? t.tokens[thread] : -1, parent = thread < t.n ? t.parents[thread] : -1;
  if (thread == 0) s.unusable = false;
  __syncthreads();
  for (int64_t i = thread; i < t.n; i += threads) {
    const int64_t target = t.target_tokens[i];
    if (cached) s.target[i] = static_cast<int32_t>(target);
    if (target < 0 && counts_in_tree(t.parents, i)) s.unusable = true;
    t.path[i] = -1;
  }
  __syncthreads();
  if (s.unusable) {
    if (thread == 0) {
      *t.accepted = 0;
      *t.next_token = -1;
    }
    return;
  }
  const auto target_of = [&](int64_t node) -> int64_t { return cached ? s.target[node] : t.target_tokens[node]; };

  int64_t node = 0, accepted = 0;
  for (int64_t start = 0; start < t.n; start += threads) {
    const int64_t child = start + thread;
    if (start > 0 && child < t.n) {
      token = t.tokens[child];
      parent = t.parents[child];
    }
    const bool matches = child < t.n && parent >= 0 && parent < child && token == target_of(parent);
    s.parent[thread] = matches ? static_cast<int32_t>(parent) : -1;
    __syncthreads();
    if (warp_index() == 0) {
      const int64_t children = t.n - start < threads ? t.n - start : threads;
      for (int64_t first = 0; first < children; first += warp_size) {
        follow(s.parent[first + lane_index()], start + first, node, accepted, t.path);
      }
    }
    __syncthreads();
  }
  if (thread == 0) {
    *t.accepted = accepted;
    *t.next_token = target_of(node);
  }
}

// The same for the trees of several texts. A tree has the rows from its root to the next one: a parent before the root
// is no node that the path comes to.
template <int threads>
__device__ void walk_trees(const TreeArguments& t, WalkShared& s) {
  constexpr int32_t none = -1, unusable = -2;
  const int64_t thread = threadIdx.x;
  const bool cached = t.n <= walk_cached;
  const auto target_of = [&](int64_t node) -> int64_t { return cached ? s.target[node] : t.target_tokens[node]; };
  const auto matching_parent = [&](int64_t row) -> int32_t {
    const int64_t parent = t.parents[row];
    if (parent < 0) return none;
    if (target_of(row) < 0) return unusable;
    return parent < row && t.tokens[row] == target_of(parent) ? static_cast<int32_t>(parent) : none;
  };
  if (thread == 0) s.ascending = true;
  __syncthreads();
  for (int64_t i = thread; i < t.n; i += threads) {
    if (cached) s.target[i] = static_cast<int32_t>(t.target_tokens[i]);
    t.path[i] = -1;
  }
  for (int64_t j = thread + 1; j < t.texts; j += threads) {
    const int64_t before = t.roots[j - 1], root = t.roots[j];
    if (root != -1 && (before == -1 || root <= before)) s.ascending = false;
  }
  __syncthreads();
  for (int64_t i = thread; cached && i < t.n; i += threads) s.parent[i] = matching_parent(i);
  __syncthreads();

  for (int64_t j = warp_index(); j < t.texts; j += threads / warp_size) {
    const int64_t root = t.roots[j], next = j + 1 < t.texts ? t.roots[j + 1] : t.n;
    const int64_t end = next >= 0 && next < t.n ? next : t.n;
    const auto parent_of_lane = [&](int64_t first) {
      const int64_t row = first + lane_index();
      return row >= end ? none : cached ? s.parent[row] : matching_parent(row);
    };
    bool sampled = s.ascending && root >= 0 && root < t.n && target_of(root) >= 0;
    for (int64_t first = root + 1; sampled && first < end; first += warp_size) {
      if (__any_sync(all_lanes, parent_of_lane(first) == unusable)) sampled = false;
    }
    int64_t node = root, accepted = 0;
    for (int64_t first = root + 1; sampled && first < end; first += warp_size) {
      follow(parent_of_lane(first), first, node, accepted, t.path + root);
    }
    if (lane_index() == 0) {
      t.accepted[j] = accepted;
      t.next_token[j] = sampled ? target_of(node) : -1;
    }
  }
}

// All threads of the block call this; target_tokens is written, and a barrier lies before.
template <int threads>
__device__ void walk(const TreeArguments& t, WalkShared& s) {
  if (t.has_roots) {
    walk_trees<threads>(t, s);
  } else {
    walk_tree<threads>(t, s);
  }
}

}  // namespace specbranch::cuda

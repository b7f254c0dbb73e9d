// The walk down a speculation tree, by one block: which children equal their parent's target token is found by one
// thread for each child; the path is then followed by a warp, 32 children at a time (parents come before children).
#pragma once

#include "sampling/cuda/logit_row.h"
#include "sampling/filters.h"

namespace specbranch::cuda {

struct TreeArguments {
  int64_t n;
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
  bool unusable;
};

// All threads of the block call this; target_tokens is written, and a barrier lies before.
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
        const int32_t mine = s.parent[first + lane_index()];
        unsigned later = all_lanes;
        for (;;) {
          const unsigned next = __ballot_sync(all_lanes, mine == node) & later;
          if (next == 0) break;
          const int found = __ffs(static_cast<int>(next)) - 1;  // of equal siblings the first one
          node = start + first + found;
          later = found == warp_size - 1 ? 0u : all_lanes << (found + 1);
          if (lane_index() == 0) t.path[accepted] = node;
          ++accepted;
        }
      }
    }
    __syncthreads();
  }
  if (thread == 0) {
    *t.accepted = accepted;
    *t.next_token = target_of(node);
  }
}

}  // namespace specbranch::cuda

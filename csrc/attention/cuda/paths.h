// Keys in the order of positions. Behind the prefix, the keys of different nodes at one position lie in different rows
// of the cache. So a block goes over a tile there once for each path from the root to a leaf. A node belongs to the
// first path that begins with its own ancestors, and sees nothing in the turns of the other paths. A trunk is one path.
#pragma once

#include "attention/cuda/keys.h"

namespace specbranch::cuda {

struct Turn {
  int tile, path;
};

struct Paths {
  Turn turns[4];  // turn i is turns[i % 4]; two are known ahead. In shared memory, since registers are scarce
  int first_node, nodes, count;
  int length[largest_block_rows];    // of a node's path
  uint8_t path[largest_block_rows];  // that a node lies on
  uint8_t leaf[largest_block_rows];  // the node whose bits are a path; the longest paths come first
  int cache_rows[2][largest_tile];   // of the keys of turn i: cache_rows[i % 2]

  // By one thread.
  __device__ void start(const RangeLoads& block, int first_tile) {
    turns[0] = {first_tile, 0};
    first_node = block.first;
    nodes = block.last + 1 - block.first;
  }
};

constexpr int no_path = 255;
static_assert(largest_block_rows < no_path, "a node's path is a byte");

// Whether the bits of `path` begin with those of `node`.
__device__ inline bool begins_with(const uint64_t* path, const uint64_t* node, int words) {
  bool highest = true;  // no bit of the node in the words so far
#pragma unroll 1
  for (int w = words - 1; w >= 0; --w) {
    const uint64_t bits = node[w];
    if (highest && bits == 0) continue;
    const uint64_t below = highest ? low_bits(64 - __clzll(static_cast<long long>(bits))) : ~uint64_t{0};
    if (((bits ^ path[w]) & below) != 0) return false;
    highest = false;
  }
  return true;
}

// Takes one warp. The longest path that is left is no part of another one.
__device__ inline void find_paths(const AttentionArguments& a, Paths& paths) {
  const int lane = threadIdx.x % warp_size, first = paths.first_node, nodes = paths.nodes;
  const auto bits = [&](int i) { return a.ancestors + (first + i) * a.ancestor_stride; };
#pragma unroll 1
  for (int i = lane; i < nodes; i += warp_size) {
    paths.length[i] = path_length(a, first + i);
    paths.path[i] = no_path;
  }
  int path = 0;
#pragma unroll 1
  for (;; ++path) {
    int longest = -1, leaf = 0;
#pragma unroll 1
    for (int i = lane; i < nodes; i += warp_size) {
      if (paths.path[i] != no_path || paths.length[i] <= longest) continue;
      longest = paths.length[i];
      leaf = i;
    }
    if (!__any_sync(all_lanes, longest >= 0)) break;
    int top = longest;
    for (int step = warp_size / 2; step > 0; step /= 2) top = max(top, __shfl_xor_sync(all_lanes, top, step));
    leaf = __shfl_sync(all_lanes, leaf, __ffs(static_cast<int>(__ballot_sync(all_lanes, longest == top))) - 1);
#pragma unroll 1
    for (int i = lane; i < nodes; i += warp_size) {
      if (paths.path[i] == no_path && begins_with(bits(leaf), bits(i), a.words)) {
        paths.path[i] = static_cast<uint8_t>(path);
      }
    }
    if (lane == 0) paths.leaf[path] = static_cast<uint8_t>(leaf);
  }
  if (lane == 0) paths.count = path;
}

// The place of the n-th set bit, from 0 on; it exists.
__device__ inline int nth_bit(uint64_t word, int n) {
  int at = 0;
#pragma unroll 1
  for (int half = 32; half > 0; half /= 2) {
    const int below = __popcll(word & low_bits(half));
    if (n < below) continue;
    n -= below;
    word >>= half;
    at += half;
  }
  return at;
}

// The cache row of a position on the node's path, from range.start on; -1 behind the path and beyond the cache.
__device__ inline int cache_row(const AttentionArguments& a, const KeyRange& range, int node, int position) {
  if (position < range.prefix) return position;
  const uint64_t* bits = a.ancestors + node * a.ancestor_stride;
  int n = position - range.prefix;
#pragma unroll 1
  for (int w = 0; w < a.words; ++w) {
    const int here = __popcll(bits[w]);
    if (n >= here) {
      n -= here;
      continue;
    }
    const int64_t row = int64_t{range.prefix} + 64 * w + nth_bit(bits[w], n);
    return row < range.capacity ? static_cast<int>(row) : -1;
  }
  return -1;
}

// Whether a block goes over the tile path by path.
template <int keys>
__device__ inline bool has_paths(const AttentionArguments& a, const KeyRange& range, int tile) {
  return a.by_position && tile * keys + keys > range.prefix;
}

// The tile's next path that reaches it, else the split's next tile.
template <int keys>
__device__ inline Turn next_turn(const AttentionArguments& a, const KeyRange& range, const Paths& paths, Turn turn) {
  const int path = turn.path + 1;
  if (has_paths<keys>(a, range, turn.tile) && path < paths.count &&
      paths.length[paths.leaf[path]] > turn.tile * keys - range.prefix) {
    return {turn.tile, path};
  }
  return {turn.tile + a.splits, 0};
}

// In turn i, from -1 on: where the keys of turn i + 1 lie, and which one is turn i + 2. All threads take part; it is
// there behind the next barrier.
template <int keys>
__device__ inline void prepare_turn(const AttentionArguments& a, const KeyRange& range, int last_tile, Paths& paths,
                                    int i) {
  const Turn next = paths.turns[(i + 1) % 4];
  if (next.tile >= last_tile) return;
  const bool by_paths = has_paths<keys>(a, range, next.tile);
  if (by_paths && (i < 0 || !has_paths<keys>(a, range, paths.turns[i % 4].tile))) {
    if (threadIdx.x < warp_size) find_paths(a, paths);
    __syncthreads();
  }
  const int thread = thread_again();
  if (thread == 0) paths.turns[(i + 2) % 4] = next_turn<keys>(a, range, paths, next);
  if (!by_paths || thread >= keys) return;
  const int leaf = paths.first_node + paths.leaf[next.path];
  paths.cache_rows[(i + 1) % 2][thread] = cache_row(a, range, leaf, next.tile * keys + thread);
}

// visible[r]: what the r-th row of a block sees in a turn, 0 behind its last row. Takes one thread for each row.
template <int keys>
__device__ inline void find_visible(const AttentionArguments& a, const KeyRange& range, const Paths& paths,
                                    const BlockRows& rows, int block_rows, Turn turn, uint64_t* visible) {
  const int r = thread_again();
  if (r >= block_rows) return;
  visible[r] = 0;
  if (r >= rows.count) return;
  const int node = a.node(rows.first + r), i = node - paths.first_node;
  const bool by_paths = has_paths<keys>(a, range, turn.tile);
  if (by_paths && paths.path[i] != turn.path) return;
  visible[r] = visible_keys(a, range, node, by_paths ? paths.length[i] : path_length(a, rows, node), turn.tile * keys);
}

}  // namespace specbranch::cuda

// Which keys a row sees.
#pragma once

#include "attention/cuda/sequences.h"

namespace specbranch::cuda {

constexpr float empty_split = -INFINITY;  // as a maximum, which is finite else: the split has no keys, and only sums

// Floats of partial results up to which a last block merges alone. One multiprocessor reads these 96 KB in about the
// time of a launch; with more, a second launch on all of them is faster.
constexpr int64_t last_block_floats = 24 * 1024;
constexpr int last_block_sums_bytes = last_block_floats / 4 * static_cast<int>(sizeof(float2));  // width 4: most sums

__device__ inline int tree_rows(const AttentionArguments& a, int node) {
  const uint64_t* bits = a.ancestors + node * a.ancestor_stride;
#pragma unroll 1
  for (int w = a.words - 1; w >= 0; --w) {
    if (bits[w] != 0) return 64 * w + 64 - __clzll(static_cast<long long>(bits[w]));
  }
  return 0;
}

// What a KeyRange of nodes [first, last] is made from. Both loads start before anything else, and neither waits for the
// other: the first tile needs them, and a load from device memory takes about 0.6 us on an H100.
struct RangeLoads {
  int first, last, sequence_first;
  int64_t prefix_length, start;
  uint64_t ancestors = 0;  // word 0 of the lane's first node

  __device__ RangeLoads(const AttentionArguments& a, const BlockRows& rows)
      : first(a.node(rows.first)),
        last(a.node(rows.first + rows.count - 1)),
        sequence_first(rows.first_node),
        prefix_length(a.prefix_length[rows.sequence]),
        start(a.starts != nullptr ? a.starts[rows.sequence] : 0) {
    const int node = first + static_cast<int>(threadIdx.x % warp_size);
    if (a.words > 0 && node <= last) ancestors = a.ancestors[node * a.ancestor_stride];
  }
};

// The keys that a block reads: cache rows from the start of its sequence on, or positions if a.by_position.
// prefix_length, starts and ancestors come from device memory and may hold anything: no row outside [0, capacity) is
// visible.
struct KeyRange {
  int start, prefix;             // clamped
  int capacity;                  // rows from start on
  int begin, end;                // no row of the block sees a key outside
  int shared_begin, shared_end;  // every row sees the keys inside

  // All lanes of the warp take part.
  __device__ KeyRange(const AttentionArguments& a, const RangeLoads& loads) {
    const int first = loads.first, last = loads.last;
    const int before = loads.sequence_first - 1;
    int highest = last - before, all_see = first - before;  // tree rows that some node sees, and that every node sees
    int deepest = last - before, shallowest = first - before;  // lengths of their paths
    if (a.ancestors != nullptr) {
      highest = all_see = deepest = 0;
      shallowest = INT32_MAX;
#pragma unroll 1
      for (int node = first + static_cast<int>(threadIdx.x % warp_size); node <= last; node += warp_size) {
        const uint64_t* words = a.ancestors + node * a.ancestor_stride;
        int length_of_path = 0;
#pragma unroll 1
        for (int w = 0; w < a.words; ++w) {
          const uint64_t bits = w == 0 && node < first + warp_size ? loads.ancestors : words[w];
          if (bits == 0) continue;
          length_of_path += __popcll(bits);
          highest = max(highest, 64 * w + 64 - __clzll(static_cast<long long>(bits)));
        }
        deepest = max(deepest, length_of_path);
        shallowest = min(shallowest, length_of_path);
      }
      for (int step = warp_size / 2; step > 0; step /= 2) {
        highest = max(highest, __shfl_xor_sync(all_lanes, highest, step));
        deepest = max(deepest, __shfl_xor_sync(all_lanes, deepest, step));
        shallowest = min(shallowest, __shfl_xor_sync(all_lanes, shallowest, step));
      }
    }
    capacity = a.capacity;
    const auto clamped = [&](int64_t row) { return static_cast<int>(min(max(row, int64_t{0}), int64_t{capacity})); };
    start = clamped(loads.start);
    capacity -= start;
    prefix = clamped(loads.prefix_length);
    end = clamped(int64_t{prefix} + (a.by_position ? deepest : highest));
    shared_end = clamped(int64_t{prefix} + all_see);
    begin = a.window == 0 ? 0 : clamped(prefix + shallowest - a.window);
    shared_begin = a.window == 0 ? 0 : clamped(prefix + deepest - a.window);
  }

  // The tiles of `keys` keys that one of several splits takes: first, first + splits, … below last, which is `splits`
  // behind the latest. So a key's split, and its turn there, follow from its number alone.
  template <int keys>
  __device__ void tiles(int split, int splits, int* first, int* last) const {
    const int before = begin / keys, behind = (end + keys - 1) / keys;
    *first = before + (split + splits - before % splits) % splits;
    *last = *first + max(behind - *first + splits - 1, 0) / splits * splits;
  }

  // Whether some row of the block does not see all of the tile.
  template <int keys>
  __device__ bool is_edge(int tile) const {
    return tile * keys < shared_begin || tile * keys + keys > shared_end;
  }
};

// Ancestors in word w that the sliding window leaves: a path's last `window` nodes.
__device__ inline uint64_t ancestor_word(const AttentionArguments& a, const uint64_t* bits, int w) {
  if (w >= a.words) return 0;
  uint64_t word = bits[w];
  if (a.window != 0) {
    int64_t left = a.window;
#pragma unroll 1
    for (int i = w + 1; i < a.words; ++i) left -= __popcll(bits[i]);
#pragma unroll 1
    for (int64_t drop = __popcll(word) - left; drop > 0 && word != 0; --drop) word &= word - 1;
  }
  return word;
}

// Of a node of a tree.
__device__ inline int path_length(const AttentionArguments& a, int node) {
  const uint64_t* bits = a.ancestors + node * a.ancestor_stride;
  int length = 0;
#pragma unroll 4
  for (int w = 0; w < a.words; ++w) length += __popcll(bits[w]);
  return length;
}

__device__ inline int path_length(const AttentionArguments& a, const BlockRows& rows, int node) {
  return a.ancestors == nullptr ? node + 1 - rows.first_node : path_length(a, node);
}

// Bit k: the node, whose path has this length, sees key `first + k`.
__device__ inline uint64_t visible_keys(const AttentionArguments& a, const KeyRange& range, int node, int length,
                                        int first) {
  const int64_t prefix = range.prefix, behind = prefix + length;
  const uint64_t in_window = a.window == 0 ? ~uint64_t{0} : ~low_bits(behind - a.window - first);
  if (a.ancestors == nullptr || a.by_position)
    return low_bits(min(behind, int64_t{range.capacity}) - first) & in_window;
  const uint64_t* bits = a.ancestors + node * a.ancestor_stride;
  uint64_t visible = first < prefix ? low_bits(prefix - first) & in_window : 0;
  const int64_t at = first - prefix;  // the tree row of bit 0
  if (at > -64) {
    if (at <= 0) {
      visible |= ancestor_word(a, bits, 0) << -at;
    } else {
      const int w = static_cast<int>(at / 64), shift = static_cast<int>(at % 64);
      visible |= ancestor_word(a, bits, w) >> shift;
      if (shift != 0) visible |= ancestor_word(a, bits, w + 1) << (64 - shift);
    }
  }
  return visible & low_bits(range.end - first);
}

}  // namespace specbranch::cuda

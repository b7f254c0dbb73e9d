// What an attention kernel is asked for, and which keys a row sees.
//
// A row is one query head of one node: row r of KV head h is node r / G, query head h * G + r % G, with G query heads
// for each KV head. Scores are in units of log2, so that exp2 serves.
#pragma once

#include <float.h>
#include <math.h>

#include "attention/softcap.h"
#include "core/cuda/ptx.h"

namespace specbranch::cuda {

constexpr int attention_threads = 128;
constexpr int attention_warps = attention_threads / warp_size;
constexpr int attention_shared_bytes = 99 * 1024;  // what a block may have on compute capability 8.6, 8.9 and 12.0
constexpr int largest_block_rows = 128;
constexpr int largest_tile = 64;  // keys

struct AttentionArguments {
  const void *query, *keys, *values;
  void* output;
  const int64_t* prefix_length;
  const uint64_t* ancestors;  // null: a chain
  // In items.
  int64_t query_stride[2], key_stride[2], value_stride[2], output_stride[2], ancestor_stride;
  int heads_per_kv, kv_heads, rows;  // rows: of one KV head
  int dim, value_dim, width;         // width: value_dim rounded up to 4
  int capacity, words;
  bool by_position;  // keys are taken in the order of positions: see Paths. Only with ancestors
  int64_t window;    // 0: none
  float factor;      // a product of query and key times this is a score
  SoftCap softcap;
  int splits;      // blocks that share the keys of a row; one writes the output, more write partial results
  float* partial;  // [splits, kv_heads, rows, width]: sums of weights times values
  float2* sums;    // [splits, kv_heads, rows]: maximum score, sum of the weights 2^(score - maximum)
  // [kv_heads, blocks of rows]: how many splits are done, and the last one merges them. Null: nothing is to be merged,
  // or a second launch does it.
  unsigned* tickets;
  bool vector_query, vector_keys, vector_values, vector_output;  // aligned for vectors

  __device__ int node(int row) const { return row / heads_per_kv; }
  __device__ int head(int kv_head, int row) const { return kv_head * heads_per_kv + row % heads_per_kv; }
};

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
  int first, last;
  int64_t prefix_length;
  uint64_t ancestors = 0;  // word 0 of the lane's first node

  __device__ RangeLoads(const AttentionArguments& a, int first_row, int count)
      : first(a.node(first_row)), last(a.node(first_row + count - 1)), prefix_length(*a.prefix_length) {
    const int node = first + static_cast<int>(threadIdx.x % warp_size);
    if (a.words > 0 && node <= last) ancestors = a.ancestors[node * a.ancestor_stride];
  }
};

// The keys that a block reads: cache rows, or positions if a.by_position. prefix_length and ancestors come from device
// memory and may hold anything: no row outside [0, capacity) is visible.
struct KeyRange {
  int prefix;                    // clamped
  int begin, end;                // no row of the block sees a key outside
  int shared_begin, shared_end;  // every row sees the keys inside

  // All lanes of the warp take part.
  __device__ KeyRange(const AttentionArguments& a, const RangeLoads& loads) {
    const int first = loads.first, last = loads.last;
    int highest = last + 1, all_see = first + 1;     // tree rows that some node sees, and that every node sees
    int deepest = last + 1, shallowest = first + 1;  // lengths of their paths
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
    const auto clamped = [&](int64_t row) { return static_cast<int>(min(max(row, int64_t{0}), int64_t{a.capacity})); };
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

__device__ inline int path_length(const AttentionArguments& a, int node) {
  if (a.ancestors == nullptr) return node + 1;
  const uint64_t* bits = a.ancestors + node * a.ancestor_stride;
  int length = 0;
#pragma unroll 4
  for (int w = 0; w < a.words; ++w) length += __popcll(bits[w]);
  return length;
}

// Bit k: the node, whose path has this length, sees key `first + k`.
__device__ inline uint64_t visible_keys(const AttentionArguments& a, const KeyRange& range, int node, int length,
                                        int first) {
  const int64_t prefix = range.prefix, behind = prefix + length;
  const uint64_t in_window = a.window == 0 ? ~uint64_t{0} : ~low_bits(behind - a.window - first);
  if (a.ancestors == nullptr || a.by_position) return low_bits(min(behind, int64_t{a.capacity}) - first) & in_window;
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

// What the attention kernels share: which keys a row sees, tiles of K and V in shared memory, and results.
//
// A row is one query head of one node: row r of KV head h is node r / G, query head h * G + r % G, with G query heads
// for each KV head. Scores are in units of log2, so that exp2 serves.
#pragma once

#include <float.h>
#include <math.h>

#include "cuda/ptx.h"
#include "cuda/tickets.h"

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
  int64_t query_stride[2], key_stride[2], value_stride[2], output_stride[2], ancestor_stride;  // in items
  int heads_per_kv, kv_heads, rows;  // rows: of one KV head
  int dim, value_dim, width;         // width: value_dim rounded up to 4
  int capacity, words;
  bool by_position;  // keys are taken in the order of positions: see Paths. Only with ancestors
  int64_t window;  // 0: none
  float factor;    // a product of query and key times this is a score, or twice tanh's argument when there is a cap
  float cap;       // in units of log2; 0: none
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

// ---- Which keys a row sees.

__device__ inline uint64_t low_bits(int64_t count) {
  return count >= 64 ? ~uint64_t{0} : count <= 0 ? 0 : (uint64_t{1} << count) - 1;
}

__device__ inline int tree_rows(const AttentionArguments& a, int node) {
  const uint64_t* bits = a.ancestors + node * a.ancestor_stride;
#pragma unroll 1
  for (int w = a.words - 1; w >= 0; --w) {
    if (bits[w] != 0) return 64 * w + 64 - __clzll(static_cast<long long>(bits[w]));
  }
  return 0;
}

// What a KeyRange of nodes [first, last] is made from. A load of device memory takes about 0.6 us on an H100, and the
// first tile can only be asked for when these two are there: both are on their way before anything else is done, and
// neither waits for the other.
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
    int highest = last + 1, all_see = first + 1;   // tree rows that some node sees, and that every node sees
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

// ---- Keys in the order of positions. In a tile with positions behind the prefix, different nodes have different rows
// at one position. So a block goes over it once for each path: the ancestors of a leaf, a node that no other node's
// ancestors go on from. A node lies on the first path that begins with its own ancestors, and sees nothing in the turns
// of the others. A trunk is one path.

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

// The cache row of a position on the node's path; -1 behind the path and beyond the cache.
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
    return row < a.capacity ? static_cast<int>(row) : -1;
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
                                    int first_row, int count, int block_rows, Turn turn, uint64_t* visible) {
  const int r = thread_again();
  if (r >= block_rows) return;
  visible[r] = 0;
  if (r >= count) return;
  const int node = a.node(first_row + r), i = node - paths.first_node;
  const bool by_paths = has_paths<keys>(a, range, turn.tile);
  if (by_paths && paths.path[i] != turn.path) return;
  visible[r] = visible_keys(a, range, node, by_paths ? paths.length[i] : path_length(a, node), turn.tile * keys);
}

// ---- Tiles in shared memory, in chunks of 16 bytes. place(row, chunk) is a chunk's offset.

// Copies rows [first, first + rows) of a head into shared memory, as far as they lie before `end`, or those that
// `cache_rows` names; the rest, and what lies behind `dim` in `used_chunks` chunks, becomes zeros. The vector copies
// are asynchronous.
template <typename T, int chunks, int rows, typename Place>
__device__ inline void load_tile(unsigned char* memory, SharedAddress address, const Place& place, const T* head,
                                 int64_t stride, int first, int end, const int* cache_rows, int dim, int used_chunks,
                                 bool vector) {
  constexpr int items = 16 / sizeof(T);
  const int thread = thread_again();
  if (vector) {
    constexpr int across = chunks & -chunks, down = attention_threads / across;
    const int row = thread / across;
#pragma unroll
    for (int j = 0; j < chunks; j += across) {
      const int chunk = thread % across + j;
      if (chunk >= used_chunks) continue;
      const bool in_dim = chunk * items < dim;
      if (cache_rows != nullptr) {
        const T* from = head + chunk * items;
#pragma unroll 4
        for (int i = 0; i < rows; i += down) {
          const int cache_row = cache_rows[row + i];
          cp_async_16(address + place(row + i, chunk), from + max(cache_row, 0) * stride, in_dim && cache_row >= 0);
        }
        continue;
      }
      const int present_rows = in_dim ? end - first : 0;
      const T* from = head + int64_t{first + row} * stride + chunk * items;
#pragma unroll
      for (int i = 0; i < rows; i += down, from += down * stride) {
        cp_async_16(address + place(row + i, chunk), from, row + i < present_rows);
      }
    }
    return;
  }
#pragma unroll 1
  for (int at = thread; at < rows * used_chunks * items; at += attention_threads) {
    const int row = at / (used_chunks * items), d = at % (used_chunks * items);
    const int cache_row = cache_rows != nullptr ? cache_rows[row] : first + row < end ? first + row : -1;
    T item = from_float<T>(0.0f);
    if (d < dim && cache_row >= 0) item = head[cache_row * stride + d];
    *reinterpret_cast<T*>(memory + place(row, d / items) + d % items * sizeof(T)) = item;
  }
}

// The same for the queries of a block: `count` rows from `first_row` on, of `rows` that there is room for.
template <typename T, int chunks, typename Place>
__device__ inline void load_queries(const AttentionArguments& a, int kv_head, int first_row, int count, int rows,
                                    unsigned char* memory, SharedAddress address, const Place& place, int used_chunks) {
  constexpr int items = 16 / sizeof(T);
  constexpr int across = chunks & -chunks, down = attention_threads / across;
  const int first = threadIdx.x / across, heads = a.heads_per_kv;
  int node = a.node(first_row + first), head = (first_row + first) % heads;  // division is slow: once is enough
#pragma unroll 1
  for (int row = first; row < rows; row += down) {
    const bool present = row < count;
    const T* from = static_cast<const T*>(a.query);
    if (present) from += node * a.query_stride[0] + (kv_head * heads + head) * a.query_stride[1];
    for (int chunk = threadIdx.x % across; chunk < used_chunks; chunk += across) {
      if (a.vector_query) {
        cp_async_16(address + place(row, chunk), from + chunk * items, present && chunk * items < a.dim);
        continue;
      }
      T* to = reinterpret_cast<T*>(memory + place(row, chunk));
      for (int i = 0; i < items; ++i) {
        to[i] = present && chunk * items + i < a.dim ? from[chunk * items + i] : from_float<T>(0.0f);
      }
    }
    node += down / heads;
    head += down % heads;
    if (head >= heads) {
      head -= heads;
      ++node;
    }
  }
}

template <typename T>
__device__ inline uint32_t without_nonfinite(uint32_t word) {
  if constexpr (sizeof(T) == 4) {
    return (word & 0x7F800000u) == 0x7F800000u ? 0 : word;
  } else {
    constexpr uint32_t exponent = std::is_same_v<T, Bfloat16> ? 0x7F80u : 0x7C00u;
    if ((word & exponent) == exponent) word &= 0xFFFF0000u;
    if ((word >> 16 & exponent) == exponent) word &= 0xFFFFu;
    return word;
  }
}

// A hidden key has the weight 0, and 0 times infinity or NaN is not 0: in a tile that not all rows see whole,
// infinities and NaN among the values are replaced by zeros, and add_nonfinite() brings them to the rows that see them.
// Returns whether the calling thread found any.
template <typename T, int chunks, int rows, typename Place>
__device__ inline bool clear_nonfinite(unsigned char* memory, const Place& place, int used_chunks) {
  bool found = false;
#pragma unroll 1
  for (int at = thread_again(); at < rows * chunks; at += attention_threads) {
    const int row = at / chunks, chunk = at % chunks;
    if (chunk >= used_chunks) continue;
    uint4* items = reinterpret_cast<uint4*>(memory + place(row, chunk));
    const uint4 old = *items;
    const uint4 clean = {without_nonfinite<T>(old.x), without_nonfinite<T>(old.y), without_nonfinite<T>(old.z),
                         without_nonfinite<T>(old.w)};
    if (clean.x == old.x && clean.y == old.y && clean.z == old.z && clean.w == old.w) continue;
    *items = clean;
    found = true;
  }
  return found;
}

// ---- Scores and weights.

// Scores come as products of query and key. They are in units of log2 / factor, or of log2 after a transformation:
// a soft cap needs one, and a factor that would turn maxima into minima.
__device__ inline bool must_transform(const AttentionArguments& a) { return a.cap > 0.0f || !(a.factor > 0.0f); }

template <int rows, int columns>
__device__ inline void transform(const AttentionArguments& a, float (&products)[rows][columns]) {
  if (a.cap > 0.0f) {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
#pragma unroll
      for (int j = 0; j < columns; ++j) {  // cap * tanh
        products[r][j] = a.cap - __fdividef(2.0f * a.cap, exp2_approximate(products[r][j] * a.factor) + 1.0f);
      }
    }
  } else {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
#pragma unroll
      for (int j = 0; j < columns; ++j) products[r][j] *= a.factor;
    }
  }
}

// A row's maximum before it has seen a score: finite, so that subtracting it from -infinity gives -infinity, not NaN.
constexpr float lowest = -FLT_MAX;

// ---- Results.

__device__ inline float4 multiply_add(float4 a, float b, float4 c) {
  return {fmaf(a.x, b, c.x), fmaf(a.y, b, c.y), fmaf(a.z, b, c.z), fmaf(a.w, b, c.w)};
}

// What becomes of a row: NaN when prefix_length or the node's ancestors send it beyond the cache, 0 when it sees
// nothing, else 1.
__device__ inline float row_outcome(const AttentionArguments& a, int node) {
  const int64_t prefix = *a.prefix_length;
  const int rows = a.ancestors == nullptr ? node + 1 : tree_rows(a, node);
  if (prefix < 0 || prefix > a.capacity - rows) return NAN;
  return prefix == 0 && rows == 0 ? 0.0f : 1.0f;
}

// What a row's sum of weighted values is multiplied by, from its sum of weights.
__device__ inline float output_factor(float outcome, float sum) {
  return outcome == 0.0f ? 0.0f : outcome * (1.0f / sum);
}

template <typename T>
__device__ inline void write_output(const AttentionArguments& a, int kv_head, int row, int column, float4 sum,
                                    float factor) {
  T* to = static_cast<T*>(a.output) + a.node(row) * a.output_stride[0] + a.head(kv_head, row) * a.output_stride[1] +
          column;
  // A sum of -0 becomes 0: it may have met a hidden key, which adds 0, or not.
  const float4 o = {(sum.x + 0.0f) * factor, (sum.y + 0.0f) * factor, (sum.z + 0.0f) * factor,
                    (sum.w + 0.0f) * factor};
  if (a.vector_output) {
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<float4*>(to) = o;
    } else {
      *reinterpret_cast<uint2*>(to) = {pack<T>(o.x, o.y), pack<T>(o.z, o.w)};
    }
    return;
  }
  to[0] = from_float<T>(o.x);
  if (column + 1 < a.value_dim) to[1] = from_float<T>(o.y);
  if (column + 2 < a.value_dim) to[2] = from_float<T>(o.z);
  if (column + 3 < a.value_dim) to[3] = from_float<T>(o.w);
}

// Four columns of a row's result: partial if there are several splits.
template <typename T>
__device__ inline void write_result(const AttentionArguments& a, int split, int kv_head, int row, int column,
                                    float4 sum, float2 maximum_and_sum) {
  if (a.splits == 1) {
    const float factor = output_factor(row_outcome(a, a.node(row)), maximum_and_sum.y);
    return write_output<T>(a, kv_head, row, column, sum, factor);
  }
  const int64_t at = (int64_t{split} * a.kv_heads + kv_head) * a.rows + row;
  *reinterpret_cast<float4*>(a.partial + at * a.width + column) = sum;
  if (column == 0) a.sums[at] = maximum_and_sum;
}

__device__ inline void write_empty(const AttentionArguments& a, int split, int kv_head, int first_row, int count) {
  for (int r = threadIdx.x; r < count; r += attention_threads) {
    const int64_t at = (int64_t{split} * a.kv_heads + kv_head) * a.rows + first_row + r;
    a.sums[at] = {empty_split, 0.0f};
  }
}

// Adds the values that clear_nonfinite() took away to the results of the rows that see them. Rare and slow: one warp
// for each row, which goes once more through the keys that it sees in the edge tiles.
template <typename T, int keys, typename RowSums>
__device__ inline void add_nonfinite(const AttentionArguments& a, const KeyRange& range, int first_tile, int last_tile,
                                     int split, int kv_head, int first_row, int count, const RowSums& row_sums) {
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
#pragma unroll 1
  for (int r = warp; r < count; r += attention_warps) {
    const int row = first_row + r, node = a.node(row), head = a.head(kv_head, row);
    const float2 sums = row_sums(r);
    const T* query = static_cast<const T*>(a.query) + node * a.query_stride[0] + head * a.query_stride[1];
#pragma unroll 1
    for (int tile = first_tile; tile < last_tile; tile += a.splits) {
      if (!range.is_edge<keys>(tile)) continue;
      uint64_t visible = visible_keys(a, range, node, path_length(a, node), tile * keys);
      if (keys < 64) visible &= low_bits(keys);
#pragma unroll 1
      for (; visible != 0; visible &= visible - 1) {
        int key_row = tile * keys + __ffsll(static_cast<long long>(visible)) - 1;
        if (a.by_position) key_row = cache_row(a, range, node, key_row);
        if (key_row < 0) continue;
        const T* value = static_cast<const T*>(a.values) + kv_head * a.value_stride[0] + key_row * a.value_stride[1];
        const auto is_finite = [](float x) { return fabsf(x) < INFINITY; };
        bool found = false;
#pragma unroll 1
        for (int d = lane; d < a.value_dim; d += warp_size) found |= !is_finite(to_float(value[d]));
        if (!__any_sync(all_lanes, found)) continue;
        const T* key = static_cast<const T*>(a.keys) + kv_head * a.key_stride[0] + key_row * a.key_stride[1];
        float product = 0.0f;
#pragma unroll 1
        for (int d = lane; d < a.dim; d += warp_size) product = fmaf(to_float(query[d]), to_float(key[d]), product);
        for (int step = warp_size / 2; step > 0; step /= 2) product += __shfl_xor_sync(all_lanes, product, step);
        float score[1][1] = {{product}};
        transform(a, score);
        const float weight = exp2_approximate(score[0][0] - sums.x);
#pragma unroll 1
        for (int d = lane; d < a.value_dim; d += warp_size) {
          const float v = to_float(value[d]);
          if (is_finite(v)) continue;
          if (a.splits == 1) {
            T* to = static_cast<T*>(a.output) + node * a.output_stride[0] + head * a.output_stride[1] + d;
            *to = from_float<T>(to_float(*to) + weight * v * output_factor(row_outcome(a, node), sums.y));
          } else {
            a.partial[((int64_t{split} * a.kv_heads + kv_head) * a.rows + row) * a.width + d] += weight * v;
          }
        }
      }
    }
  }
}

// ---- Merging the splits.

// Whether the calling block is the last to be done of the splits of its rows; it then sees what all of them wrote. All
// threads take part. `last` is in shared memory.
__device__ inline bool is_last_split(const AttentionArguments& a, int kv_head, int* last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *last = takes_last_ticket(a.tickets + kv_head * gridDim.x + blockIdx.x, a.splits);
  __syncthreads();
  if (!*last) return false;
  __threadfence();
  return true;
}

// Writes the output of `count` rows from their partial results; `sums` is room for [splits, count] in shared memory.
// Four columns of a row are one thread's: four sums, each of every fourth split, and then the sum of these. A batch of
// loads is on its way at once, because a load takes longer than all that is done with it.
template <typename T>
__device__ inline void merge_splits(const AttentionArguments& a, int kv_head, int first_row, int count, float2* sums) {
  constexpr int batch = 16, chains = 4;
  const int64_t first = int64_t{kv_head} * a.rows + first_row, step = int64_t{a.kv_heads} * a.rows;
#pragma unroll 1
  for (int at = threadIdx.x; at < a.splits * count; at += blockDim.x) {
    sums[at] = a.sums[first + at / count * step + at % count];
  }
  __syncthreads();
  const int columns = a.width / 4;
#pragma unroll 1
  for (int at = threadIdx.x; at < count * columns; at += blockDim.x) {
    const int row = at / columns, column = at % columns * 4;
    const float outcome = row_outcome(a, a.node(first_row + row));
    float maximum = lowest;
#pragma unroll 4
    for (int s = 0; s < a.splits; ++s) maximum = fmaxf(maximum, sums[s * count + row].x);

    float4 total[chains] = {};
    float weights[chains] = {};
    const float* const part = a.partial + (first + row) * a.width + column;
#pragma unroll 1
    for (int from = 0; from < a.splits; from += batch) {
      float4 parts[batch];
      float2 found[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int split = from + i;
        found[i] = split < a.splits ? sums[split * count + row] : float2{empty_split, 0.0f};
        parts[i] = load_present(part + split * step * a.width, found[i].x != empty_split);
      }
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const float share = exp2_approximate(found[i].x - maximum);
        weights[i % chains] = fmaf(found[i].y, share, weights[i % chains]);
        total[i % chains] = multiply_add(parts[i], share, total[i % chains]);
      }
    }
    for (int c = 1; c < chains; ++c) {
      weights[0] += weights[c];
      total[0] = multiply_add(total[c], 1.0f, total[0]);
    }
    write_output<T>(a, kv_head, first_row + row, column, total[0], output_factor(outcome, weights[0]));
  }
}

}  // namespace specbranch::cuda

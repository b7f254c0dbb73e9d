// Tree attention on the CPU. The rows of one KV head (nodes x query heads) are cut into groups, the keys into
// segments of 512 positions in the text; each pair gives a partial result (maximum, sum, output), and the partials of
// a group are merged in the order of the keys. A key belongs to a segment by its position, wherever its cache row is.
// So a row's bits depend neither on the thread count, nor on the other rows of the call, nor on how much of its text
// is committed: verifying a node in a tree gives what decoding its path token by token gives. Rows of several texts
// never share a group: each text is cut as it is when it is alone, and the groups of all texts are one parallel loop.
#include "attention/tree_attention.h"

#include <algorithm>
#include <type_traits>

#include "attention/cpu/tile.h"
#include "core/bits.h"
#include "core/cpu/memory.h"
#include "core/cpu/threads.h"
#include "core/workspace.h"

namespace specbranch::cpu::SPECBRANCH_ISA {
namespace {

constexpr int64_t segment_keys = 8 * tile_keys;
constexpr int64_t group_rows = 96;  // rows that share a packed tile; their queries and outputs stay in the L2 cache
constexpr int64_t max_partial_floats = int64_t{1} << 22;  // 16 MiB: above it there is work enough without splitting
// Below this many multiply-adds one thread computes all: 25 to 50 microseconds of work, depending on how many rows
// share the keys. Waking a sleeping thread takes 45, and milliseconds where its core is busy; see linear.cpp.
constexpr int64_t min_parallel_products = 1500000;

using Workspace = specbranch::Workspace<64>;

// Maximum, sum of weights and weighted sum of values for each row of a group.
struct Partial {
  float *maximum, *sum, *output;

  Partial(float* storage, int64_t rows) : maximum(storage), sum(storage + rows), output(storage + 2 * rows) {}
  static int64_t floats(int64_t rows, int64_t width) { return rows * (2 + width); }
};

// What one thread works in.
struct Scratch {
  float *query, *packed, *values, *scores, *partial, *total;
  uint64_t* visible;
};

// A text that has queries: its rows of the cache, its queries and how they are cut.
struct Sequence {
  int64_t start, prefix, tree_rows;
  int64_t first, nodes;
  int64_t tree_tiles, segments, nodes_per_group, groups_per_head, groups;
};

// Kept from call to call.
struct Memory {
  Buffer<Sequence> sequences;
  Buffer<char> workspace;
};

// What every thread reads, and the plan of the work.
struct Problem {
  const TreeAttentionParams& params;
  int64_t nodes, heads_per_kv, kv_heads, dim, value_dim, width;  // width: value_dim rounded up to whole panels
  const Sequence* sequences;
  int64_t sequence_count = 0, groups = 0;
  int64_t tree_tiles = 0, segments = 0, nodes_per_group = 0;  // the most that a sequence has
  int64_t rows_per_group, partial_floats;
  bool split;  // each segment of a group is a task of its own
  int64_t tasks;
  int threads;
  float factor;  // of products of query and key, to scores in units of log2, so that exp2 serves
  SoftCap softcap;
  int64_t* tree_depths = nullptr;    // [nodes, tree_tiles]: ancestors in earlier tiles; unused for a chain
  int64_t* window_starts = nullptr;  // [nodes]: first visible position; unused without a window
  const float* zeros = nullptr;      // [dim]
  float* partials = nullptr;         // [groups, segments, partial_floats], if split
  char* scratch = nullptr;           // [threads, scratch_bytes]
  int64_t scratch_bytes = 0;

  Problem(const TreeAttentionParams& p, Memory& memory) : params(p) {
    nodes = p.query.shape[0];
    kv_heads = p.keys.shape[0];
    heads_per_kv = p.query.shape[1] / kv_heads;
    dim = p.query.shape[2];
    value_dim = p.values.shape[2];
    width = divide_up(value_dim, panel) * panel;
    find_sequences(memory.sequences);
    int64_t scores = 0;
    for (int64_t q = 0; q < sequence_count; ++q) {
      const Sequence& sequence = sequences[q];
      groups += sequence.groups;
      tree_tiles = std::max(tree_tiles, sequence.tree_tiles);
      segments = std::max(segments, sequence.segments);
      nodes_per_group = std::max(nodes_per_group, sequence.nodes_per_group);
      scores += sequence.nodes * p.query.shape[1] * (sequence.prefix + sequence.tree_rows);
    }
    rows_per_group = nodes_per_group * heads_per_kv;
    partial_floats = Partial::floats(rows_per_group, width);
    // All threads or one: another team size would make OpenMP end threads and start them again for the next op.
    const int64_t products = scores * (dim + value_dim);
    threads = products < min_parallel_products ? 1 : std::max(p.launch.threads, 1);
    split = segments > 1 && groups < 4 * threads && groups % threads != 0 &&
            groups * segments * partial_floats <= max_partial_floats;
    tasks = split ? groups * segments : groups;
    factor = static_cast<float>(p.scale * log2_e);
    softcap = SoftCap(p.softcap);

    Workspace per_thread(nullptr), sizes(nullptr);
    take_scratch(per_thread);
    scratch_bytes = per_thread.bytes;
    take_shared(sizes);
    Workspace workspace(memory.workspace.at_least(sizes.bytes));
    take_shared(workspace);
    for (int64_t q = 0; q < sequence_count; ++q) find_visible(sequences[q]);
  }

  void find_sequences(Buffer<Sequence>& memory) {
    const int64_t count = params.ragged ? params.starts.shape[0] : 1;
    const int64_t* numbers = params.ragged ? params.sequence.as<const int64_t>() : nullptr;
    Sequence* found = memory.at_least(count);
    sequences = found;
    int64_t end = 0;
    for (int64_t q = 0; q < count; ++q) {
      const int64_t first = end;
      if (!params.ragged) end = nodes;
      while (end < nodes && numbers[end] == q) ++end;
      if (first == end) continue;
      Sequence& s = found[sequence_count++];
      s.start = params.ragged ? params.starts.as<const int64_t>()[q] : 0;
      s.prefix = params.prefix_length.as<const int64_t>()[q];
      s.first = first;
      s.nodes = end - first;
      s.tree_rows = tree_rows(params, first, s.nodes);
      s.tree_tiles = divide_up(s.tree_rows, tile_keys);
      s.segments = divide_up(s.prefix + s.tree_rows, segment_keys);
      s.nodes_per_group = std::min(std::max<int64_t>(1, group_rows / heads_per_kv), s.nodes);
      s.groups_per_head = divide_up(s.nodes, s.nodes_per_group);
      s.groups = s.groups_per_head * kv_heads;
    }
  }

  void take_shared(Workspace& workspace) {
    tree_depths = workspace.take<int64_t>(params.chain ? 0 : nodes * tree_tiles);
    window_starts = workspace.take<int64_t>(params.sliding_window ? nodes : 0);
    float* row = workspace.take<float>(dim);
    if (row) std::fill_n(row, dim, 0.0f);
    zeros = row;
    partials = workspace.take<float>(split ? tasks * partial_floats : 0);
    scratch = workspace.take<char>(threads * scratch_bytes);
  }

  Scratch take_scratch(Workspace& workspace) const {
    Scratch s;
    s.query = workspace.take<float>(rows_per_group * dim);
    s.packed = workspace.take<float>(tile_keys * dim);
    s.values = workspace.take<float>(tile_keys * width);
    s.scores = workspace.take<float>(block_rows * tile_keys);
    s.partial = workspace.take<float>(partial_floats);
    s.total = workspace.take<float>(partial_floats);
    s.visible = workspace.take<uint64_t>(nodes_per_group);
    return s;
  }

  void find_visible(const Sequence& sequence) {
    const int64_t window = params.sliding_window;
    for (int64_t i = sequence.first; i < sequence.first + sequence.nodes; ++i) {
      int64_t depth = i - sequence.first;
      if (!params.chain) {
        depth = -1;
        for (int64_t w = 0; w < sequence.tree_tiles; ++w) {
          tree_depths[i * tree_tiles + w] = depth + 1;
          depth += __builtin_popcountll(ancestor_bits(i, w));
        }
      }
      if (window) window_starts[i] = sequence.prefix + depth + 1 - window;
    }
  }

  uint64_t ancestor_bits(int64_t node, int64_t word) const {
    return params.ancestors.as<const uint64_t>()[node * params.ancestors.stride[0] + word];
  }

  // Which keys of a tile, at positions [begin, end) of the text, one of its nodes sees.
  uint64_t visible(const Sequence& sequence, int64_t node, bool in_tree, int64_t tile, int64_t begin,
                   int64_t end) const {
    const int64_t prefix = sequence.prefix;
    if (params.sliding_window) begin = std::max(begin, window_starts[node]);
    if (!in_tree || params.chain) {  // here a key's position is its row
      const int64_t first = tile * tile_keys + (in_tree ? prefix : 0);
      end = std::min(end, in_tree ? prefix + node - sequence.first + 1 : prefix);
      return low_bits(end - first) & ~low_bits(begin - first);
    }
    // The ancestors' positions are prefix, prefix + 1, ... in the order of their bits.
    const uint64_t bits = ancestor_bits(node, tile);
    const int64_t first = prefix + tree_depths[node * tree_tiles + tile];
    const auto without_first = [](uint64_t left, int64_t count) {
      for (; count > 0 && left != 0; --count) left &= left - 1;
      return left;
    };
    return without_first(bits, begin - first) & ~without_first(bits, std::max<int64_t>(end - first, 0));
  }
};

// The rows of nodes [first, first + nodes) of a sequence under one KV head, node by node, in register blocks of equal
// size.
struct Group {
  const Sequence* sequence;
  int64_t kv_head, first, nodes, rows, blocks;

  Group(const Problem& p, int64_t index) : sequence(p.sequences) {
    for (; index >= sequence->groups; ++sequence) index -= sequence->groups;
    const int64_t before = index % sequence->groups_per_head * sequence->nodes_per_group;
    kv_head = index / sequence->groups_per_head;
    first = sequence->first + before;
    nodes = std::min(sequence->nodes_per_group, sequence->nodes - before);
    rows = nodes * p.heads_per_kv;
    blocks = divide_up(rows, block_rows);
  }

  int64_t block_begin(int64_t block) const { return block * rows / blocks; }
};

template <typename Body>
void with_rows(int64_t rows, const Body& body) {
  switch (rows) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 5: return body(std::integral_constant<int, 5>{});
    default: return body(std::integral_constant<int, block_rows>{});
  }
}

// Queries as float32, each register block as [D][rows of the block].
template <typename T>
void pack_queries(const Problem& p, const Group& group, float* packed) {
  const Tensor& query = p.params.query;
  for (int64_t block = 0; block < group.blocks; ++block) {
    const int64_t begin = group.block_begin(block), rows = group.block_begin(block + 1) - begin;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t node = group.first + (begin + r) / p.heads_per_kv;
      const int64_t head = group.kv_head * p.heads_per_kv + (begin + r) % p.heads_per_kv;
      const T* row = query.as<const T>() + node * query.stride[0] + head * query.stride[1];
      float* out = packed + begin * p.dim + r;
      for (int64_t d = 0; d < p.dim; ++d) out[d * rows] = to_float(row[d]);
    }
  }
}

// Adds the keys of one tile, as far as they lie at positions [begin, end), to a segment's result.
template <typename T>
void attend_tile(const Problem& p, const Group& group, bool in_tree, int64_t tile, int64_t begin, int64_t end,
                 const Scratch& s, const Partial& result) {
  const Tensor &keys = p.params.keys, &values = p.params.values;
  uint64_t any = 0, all = ~uint64_t{0};
  for (int64_t i = 0; i < group.nodes; ++i) {
    const uint64_t visible = p.visible(*group.sequence, group.first + i, in_tree, tile, begin, end);
    s.visible[i] = visible;
    any |= visible;
    all &= visible;
  }
  if (any == 0) return;

  const int64_t row = group.sequence->start + tile * tile_keys + (in_tree ? group.sequence->prefix : 0);
  const int count = 64 - __builtin_clzll(any);
  const T* key_rows = keys.as<const T>() + group.kv_head * keys.stride[0] + row * keys.stride[1];
  const T* value_rows = values.as<const T>() + group.kv_head * values.stride[0] + row * values.stride[1];
  pack_keys(key_rows, keys.stride[1], count, p.dim, reinterpret_cast<const T*>(p.zeros), s.packed);
  const float* wide = s.values;
  int64_t wide_stride = p.width;
  bool direct = false;
  if constexpr (std::is_same_v<T, float>) direct = p.width == p.value_dim;
  if (direct) {
    wide = reinterpret_cast<const float*>(value_rows);
    wide_stride = values.stride[1];
  } else {
    widen_values(value_rows, values.stride[1], count, p.value_dim, p.width, s.values);
  }
  const bool skip_masked = all != low_bits(count) && !all_finite(wide, wide_stride, count, p.width);

  for (int64_t block = 0; block < group.blocks; ++block) {
    const int64_t first_row = group.block_begin(block), last_row = group.block_begin(block + 1);
    uint64_t seen = 0;
    for (int64_t i = first_row / p.heads_per_kv; i <= (last_row - 1) / p.heads_per_kv; ++i) seen |= s.visible[i];
    if (seen == 0) continue;
    float* output = result.output + first_row * p.width;
    with_rows(last_row - first_row, [&](auto constant) {
      constexpr int rows = decltype(constant)::value;
      float rescale[rows];
      float* scores = s.scores;
      score_block<rows>(s.query + first_row * p.dim, s.packed, p.dim, scores);
      for (int r = 0; r < rows; ++r) {
        const int64_t i = first_row + r;
        const uint64_t visible = s.visible[i / p.heads_per_kv];
        rescale[r] = softmax_row(scores + r * tile_keys, visible, p.factor, p.softcap, &result.maximum[i]);
      }
      sum_block<rows>(scores, rescale, count, result.sum + first_row);
      if (!skip_masked) {
        value_block<rows>(scores, rescale, wide, wide_stride, count, p.width, output);
        return;
      }
      for (int r = 0; r < rows; ++r) {
        value_row_masked(scores + r * tile_keys, rescale[r], s.visible[(first_row + r) / p.heads_per_kv], wide,
                         wide_stride, p.width, output + r * p.width);
      }
    });
  }
}

template <typename T>
void attend_segment(const Problem& p, const Group& group, int64_t segment, const Scratch& s, const Partial& result) {
  std::fill_n(result.maximum, group.rows, -INFINITY);
  std::fill_n(result.sum, group.rows, 0.0f);
  std::fill_n(result.output, group.rows * p.width, 0.0f);
  const int64_t begin = segment * segment_keys, end = begin + segment_keys;
  const int64_t prefix = group.sequence->prefix, tree_tiles = group.sequence->tree_tiles;
  // A tree's node at depth d has row d or a later one, so the earlier tiles of the tree hold no key of this segment.
  for (int64_t tile = begin / tile_keys; tile * tile_keys < std::min(end, prefix); ++tile) {
    attend_tile<T>(p, group, false, tile, begin, end, s, result);
  }
  if (end <= prefix) return;
  const int64_t last = p.params.chain ? std::min(tree_tiles, divide_up(end - prefix, tile_keys)) : tree_tiles;
  for (int64_t tile = std::max<int64_t>(begin - prefix, 0) / tile_keys; tile < last; ++tile) {
    attend_tile<T>(p, group, true, tile, begin, end, s, result);
  }
}

void merge(const Problem& p, int64_t rows, const Partial& total, const Partial& next) {
  for (int64_t r = 0; r < rows; ++r) {
    const float maximum = next.maximum[r] > total.maximum[r] ? next.maximum[r] : total.maximum[r];
    const float base = maximum == -INFINITY ? 0.0f : maximum;
    const float a = exp2_nonpositive(total.maximum[r] - base), b = exp2_nonpositive(next.maximum[r] - base);
    total.maximum[r] = maximum;
    total.sum[r] = total.sum[r] * a + next.sum[r] * b;
    float *out = total.output + r * p.width, *in = next.output + r * p.width;
    for (int64_t d = 0; d < p.width; d += lanes) {
      store(out + d, multiply_add(load(in + d), broadcast(b), load(out + d) * a));
    }
  }
}

template <typename T>
void write_output(const Problem& p, const Group& group, const Partial& total) {
  const Tensor& output = p.params.output;
  for (int64_t r = 0; r < group.rows; ++r) {
    const int64_t node = group.first + r / p.heads_per_kv;
    const int64_t head = group.kv_head * p.heads_per_kv + r % p.heads_per_kv;
    T* out = output.as<T>() + node * output.stride[0] + head * output.stride[1];
    const float factor = 1.0f / total.sum[r];
    for (int64_t d = 0; d < p.value_dim; ++d) store(out + d, total.output[r * p.width + d] * factor);
  }
}

void start(const Problem& p, const Partial& total, int64_t rows) {
  std::fill_n(total.maximum, rows, -INFINITY);
  std::fill_n(total.sum, rows, 0.0f);
  std::fill_n(total.output, rows * p.width, 0.0f);
}

template <typename T>
void run(const TreeAttentionParams& params) {
  static thread_local Memory memory;
  const Problem p(params, memory);
#pragma omp parallel num_threads(p.threads)
  {
    Workspace workspace(p.scratch + thread_index() * p.scratch_bytes);
    const Scratch s = p.take_scratch(workspace);
    if (p.split) {
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < p.tasks; ++task) {
        const Group group(p, task / p.segments);
        if (task % p.segments >= group.sequence->segments) continue;
        pack_queries<T>(p, group, s.query);
        const Partial partial(p.partials + task * p.partial_floats, p.rows_per_group);
        attend_segment<T>(p, group, task % p.segments, s, partial);
      }
    }
#pragma omp for schedule(dynamic) nowait
    for (int64_t index = 0; index < p.groups; ++index) {
      const Group group(p, index);
      const Partial total(s.total, p.rows_per_group);
      start(p, total, group.rows);
      if (!p.split) pack_queries<T>(p, group, s.query);
      for (int64_t segment = 0; segment < group.sequence->segments; ++segment) {
        float* storage = p.split ? p.partials + (index * p.segments + segment) * p.partial_floats : s.partial;
        const Partial partial(storage, p.rows_per_group);
        if (!p.split) attend_segment<T>(p, group, segment, s, partial);
        merge(p, group.rows, total, partial);
      }
      write_output<T>(p, group, total);
    }
  }
}

}  // namespace

void tree_attention(const TreeAttentionParams& params) {
  if (params.query.shape[0] == 0) return;
  switch (params.query.dtype) {
    case Dtype::float32: return run<float>(params);
    case Dtype::bfloat16: return run<Bfloat16>(params);
    default: return run<Float16>(params);
  }
}

}  // namespace specbranch::cpu::SPECBRANCH_ISA

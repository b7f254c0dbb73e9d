// Tree attention on CUDA: the keys of a KV head are split over blocks (as in Flash-Decoding), each block keeps running
// maxima and sums over its tiles (online softmax, arXiv 2205.14135), and partial results are merged by their
// log-sum-exp. Rows are nodes x query heads of a KV head; all of them share the tiles of K and V. 16-bit inputs go to
// tensor cores (mma.h), float32 to plain cores (plain.h).
//
// With few partial results, the block that is done last of those that share rows merges them: one launch. With many,
// that would leave all multiprocessors but a few idle: 32 rows, 33 splits and 128 columns are 540 KB for each block,
// which one multiprocessor reads in about 5 us. A second launch is faster then, and adds up in the same order.
//
// Lower bound: the bytes of K and V once, 2 * kv_heads * length * head_dim items. Each byte of 16-bit keys or values
// takes part in one operation per row. A device does many operations in the time of a byte (about 200 on an H100): with
// so many rows the 4 * nodes * query_heads * length * head_dim operations take as long as the bytes.
//
// For a captured graph the grid depends on shapes only: splits come from the number of heads, rows and the capacity. A
// block reads prefix_length and takes every splits-th tile of those in use, so a short prefix in a large cache still
// keeps all blocks busy. The mask is made from ancestor bits, in the tiles that not every row of a block sees whole.
//
// Rows of several texts are cut into blocks text by text, and a block finds its rows in `sequence` (sequences.h). The
// grid has room for every share of the rows, and the blocks that are too many end at once.
//
// Bad data cannot raise here. Rows of the cache beyond the capacity are never read; the output of a query that
// prefix_length, starts or its ancestors send there is NaN, as it is where a sequence is out of range or decreases. A
// query that sees nothing gives zeros.
//
// Bits: a query's output is a function of the query and of the keys and values that it sees in the order of positions,
// for the same shapes, type, scale, window and cap, as long as the values are finite. It does not depend on
// prefix_length, on the rows of the tree that the ancestors lie in, on strides, or on what else the call and the cache
// hold. So decoding token by token and verifying a tree, with as many queries, give the same bits. For that,
//   - a position's split, tile and slot follow from its number alone: split s takes tiles s, s + splits, …;
//   - behind the prefix a tile is put together along a path (paths.h), so that a node's key has the slot of
//     its position, wherever its row is;
//   - a key that a row does not see leaves the row's maximum and sums as they are: its weight is 0, and a sum plus 0,
//     or times 2^0, is that sum; a split without a visible key adds a sum that is 0.
// They do depend on the number of queries and heads and on the capacity, which decide how many splits there are and how
// a block's warps share a tile. A value that is infinite or NaN reaches whoever sees it, as one or the other.
//
// For a trunk, the order of positions costs one warp's look at the ancestors, in the blocks that have such tiles: a
// fraction of a microsecond. Each further leaf among a block's nodes costs one more turn over the tile or two that hold
// the tree: in 16 bits, with 128 columns, 32 KB from the L2 cache and, for 128 rows, 4 million multiply-adds, about a
// microsecond on an H100. With by_position false (a draft's attention) all leaves take one turn.
#include "attention/tree_attention.h"

#include <algorithm>

#include "attention/cuda/mma.h"
#include "attention/cuda/plain.h"

namespace specbranch::cuda {
namespace {

constexpr int64_t target_blocks = 264;  // two for each multiprocessor of an H100: one wave
constexpr int64_t min_split_keys = 64;
constexpr int64_t max_dim = 512;

static_assert(target_blocks / 2 <= max_tickets, "a ticket for each block of rows and KV head that has two splits");

// One block for a few rows of a KV head. Without the 1, the compiler saves registers and waits for each load.
template <typename T>
__global__ void __launch_bounds__(warp_size, 1)
    merge_rows(const __grid_constant__ AttentionArguments a, int block_rows) {
  const BlockRows rows = rows_of_block(a, static_cast<int>(blockIdx.x), block_rows);
  if (rows.count > 0) merge_splits<T>(a, blockIdx.y, rows, shared_memory<float2>());
}

int64_t split_count(int64_t blocks, int64_t capacity) {
  return std::max<int64_t>(1, std::min(target_blocks / std::max<int64_t>(blocks, 1), capacity / min_split_keys));
}

// Whether the base, the strides and the length of a tensor's rows are multiples of `bytes`.
bool aligned(const Tensor& t, int64_t bytes) {
  uint64_t bits = reinterpret_cast<uint64_t>(t.data) | static_cast<uint64_t>(t.shape[t.dims - 1] * t.item_bytes);
  for (int i = 0; i < t.dims - 1; ++i) {
    if (t.shape[i] > 1) bits |= static_cast<uint64_t>(t.stride[i] * t.item_bytes);
  }
  return bits % bytes == 0;
}

struct Grid {
  int64_t block_rows;
  AttentionArguments* arguments;
  const TreeAttentionParams* params;

  // Decides about the splits; kernel(arguments, …) then runs once for each block of rows, split and KV head.
  template <typename Kernel, typename... More>
  void run(Kernel kernel, int shared_bytes, More... more) const {
    AttentionArguments& a = *arguments;
    const int64_t blocks = block_count(a, block_rows);
    a.splits = static_cast<int>(split_count(blocks * a.kv_heads, a.capacity));
    a.partial = static_cast<float*>(params->launch.workspace);
    a.sums = reinterpret_cast<float2*>(a.partial + int64_t{a.splits} * a.kv_heads * a.rows * a.width);
    const bool few = std::min<int64_t>(a.rows, block_rows) * a.splits * a.width <= last_block_floats;
    a.tickets = a.splits > 1 && few ? params->launch.tickets : nullptr;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(a.splits), static_cast<unsigned>(a.kv_heads));
    launch("tree_attention", kernel, params->launch, grid, dim3(attention_threads), shared_bytes, a, more...);
  }
};

template <typename T, int Dim, bool wide>
void run_mma(const TreeAttentionParams& p, AttentionArguments& a, int row_warps) {
  using Shape = MmaShape<Dim>;
  static_assert(Dim <= 256 || wide, "columns are shared in wide blocks only");
  const Grid grid{row_warps * Shape::warp_rows, &a, &p};
  grid.run(attend_mma<T, Dim, wide>, Shape::shared_bytes(row_warps), row_warps);
}

// rows: of a sequence, as many as they have on average.
template <typename T>
void attend(const TreeAttentionParams& p, AttentionArguments& a, int dim, int64_t rows) {
  if (dim <= 128) {
    constexpr int warp_rows = MmaShape<128>::warp_rows;
    if (rows <= 2 * warp_rows) return run_mma<T, 128, false>(p, a, rows <= warp_rows ? 1 : 2);
    if (dim <= 64) return run_mma<T, 64, true>(p, a, attention_warps);
    if (dim <= 96) return run_mma<T, 96, true>(p, a, attention_warps);
    return run_mma<T, 128, true>(p, a, attention_warps);
  }
  if (dim > 256) return run_mma<T, 512, true>(p, a, MmaShape<512>::wide_row_warps);
  if (rows <= 2 * MmaShape<256>::warp_rows) return run_mma<T, 256, false>(p, a, 2);
  run_mma<T, 256, true>(p, a, attention_warps);
}

template <int Dim, bool wide>
void run_plain(const TreeAttentionParams& p, AttentionArguments& a) {
  using Shape = PlainShape<Dim, wide>;
  const Grid grid{Shape::rows, &a, &p};
  grid.run(attend_plain<Dim, wide>, Shape::shared_bytes);
}

template <>
void attend<float>(const TreeAttentionParams& p, AttentionArguments& a, int dim, int64_t rows) {
  if (dim <= 128) return rows <= 8 ? run_plain<128, false>(p, a) : run_plain<128, true>(p, a);
  if (dim > 256) return run_plain<512, false>(p, a);
  rows <= 8 ? run_plain<256, false>(p, a) : run_plain<256, true>(p, a);
}

template <typename T>
void run(const TreeAttentionParams& p) {
  const Tensor &query = p.query, &keys = p.keys, &values = p.values, &output = p.output;
  const int64_t nodes = query.shape[0], kv_heads = keys.shape[0], capacity = keys.shape[1];
  const int64_t dim = std::max(query.shape[2], values.shape[2]), heads_per_kv = query.shape[1] / kv_heads;
  if (query.shape[2] > max_dim) {
    fail("query: expected at most 512 elements per head on CUDA, got shape " + shape_text(query));
  }
  if (values.shape[2] > max_dim) {
    fail("values: expected at most 512 elements per head on CUDA, got shape " + shape_text(values));
  }
  if (capacity > INT32_MAX - 256 || kv_heads > 65535) {
    fail("keys: expected at most 65535 heads and fewer than 2^31 - 256 rows on CUDA, got shape " + shape_text(keys));
  }
  const int64_t words = p.chain ? 0 : p.ancestors.shape[1];
  if (nodes * heads_per_kv > INT32_MAX - 256 || nodes * words > INT32_MAX / 64) {
    fail("query: expected fewer nodes on CUDA, got shape " + shape_text(query));
  }

  AttentionArguments a{};
  a.query = query.data;
  a.keys = keys.data;
  a.values = values.data;
  a.output = output.data;
  a.prefix_length = p.prefix_length.as<const int64_t>();
  if (p.ragged) {
    a.starts = p.starts.as<const int64_t>();
    a.sequence = p.sequence.as<const int64_t>();
  }
  a.sequences = p.ragged ? static_cast<int>(p.starts.shape[0]) : 1;
  a.ancestors = p.chain ? nullptr : p.ancestors.as<const uint64_t>();
  for (int i = 0; i < 2; ++i) {
    a.query_stride[i] = query.stride[i];
    a.key_stride[i] = keys.stride[i];
    a.value_stride[i] = values.stride[i];
    a.output_stride[i] = output.stride[i];
  }
  a.ancestor_stride = p.chain ? 0 : p.ancestors.stride[0];
  a.heads_per_kv = static_cast<int>(heads_per_kv);
  a.kv_heads = static_cast<int>(kv_heads);
  a.rows = static_cast<int>(nodes * heads_per_kv);
  a.dim = static_cast<int>(query.shape[2]);
  a.value_dim = static_cast<int>(values.shape[2]);
  a.width = static_cast<int>(divide_up(values.shape[2], 4) * 4);
  a.capacity = static_cast<int>(capacity);
  a.words = static_cast<int>(words);
  a.by_position = p.by_position && !p.chain;
  a.window = p.sliding_window < capacity ? p.sliding_window : 0;  // a wider one hides nothing, and could overflow
  a.softcap = SoftCap(p.softcap);
  a.factor = static_cast<float>(p.scale * log2_e);
  a.vector_query = aligned(query, 16);
  a.vector_keys = aligned(keys, 16);
  a.vector_values = aligned(values, 16);
  a.vector_output = aligned(output, 4 * output.item_bytes);

  attend<T>(p, a, static_cast<int>(dim), divide_up(nodes, a.sequences) * heads_per_kv);
  if (a.splits > 1 && a.tickets == nullptr) {
    const int64_t block_rows = divide_up(warp_size, a.width / 4);  // a thread for four columns
    launch("tree_attention (merge)", merge_rows<T>, p.launch,
           dim3(static_cast<unsigned>(block_count(a, block_rows)), static_cast<unsigned>(a.kv_heads)), dim3(warp_size),
           static_cast<size_t>(a.splits * block_rows) * sizeof(float2), a, static_cast<int>(block_rows));
  }
}

}  // namespace

int64_t tree_attention_workspace(int64_t nodes, int64_t query_heads, int64_t kv_heads, int64_t value_dim,
                                 int64_t capacity) {
  if (kv_heads < 1) return 0;
  const int64_t rows = nodes * (query_heads / kv_heads);
  const int64_t splits = split_count(divide_up(rows, int64_t{largest_block_rows}) * kv_heads, capacity);
  const int64_t width = divide_up(value_dim, 4) * 4;
  return splits == 1 ? 0 : splits * kv_heads * rows * (width + 2) * static_cast<int64_t>(sizeof(float));
}

void tree_attention(const TreeAttentionParams& params) {
  if (params.query.shape[0] == 0 || params.values.shape[2] == 0) return;
  switch (params.query.dtype) {
    case Dtype::float32: return run<float>(params);
    case Dtype::bfloat16: return run<Bfloat16>(params);
    default: return run<Float16>(params);
  }
}

}  // namespace specbranch::cuda

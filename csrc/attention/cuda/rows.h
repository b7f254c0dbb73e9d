// What becomes of a row's scores: weights, results, and the results of several splits merged.
#pragma once

#include "attention/cuda/paths.h"
#include "attention/cuda/tile.h"
#include "core/cuda/tickets.h"

namespace specbranch::cuda {

// ---- Scores and weights.

// Scores come as products of query and key. They are in units of log2 / factor, or of log2 after a transformation:
// a soft cap needs one, and a factor that would turn maxima into minima.
__device__ inline bool must_transform(const AttentionArguments& a) {
  return a.softcap.cap > 0.0f || !(a.factor > 0.0f);
}

template <int rows, int columns>
__device__ inline void transform(const AttentionArguments& a, float (&products)[rows][columns]) {
  if (a.softcap.cap > 0.0f) {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        const float score = products[r][j] * a.factor, y = score * a.softcap.unit;
        const float tanh = 1.0f - __fdividef(2.0f, exp2_approximate(y) + 1.0f);
        products[r][j] = fabsf(y) < series_limit ? score * tanh_series(y) : a.softcap.cap * tanh;
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

// What becomes of a node's row: NaN when starts, prefix_length or its ancestors send it beyond the cache and when its
// block is of another sequence, because that of the node is out of range or comes too late; 0 when it sees nothing;
// else 1.
__device__ inline float row_outcome(const AttentionArguments& a, const BlockRows& rows, int node) {
  int64_t room = a.capacity;
  if (a.sequence != nullptr) {
    const int64_t start = a.starts[rows.sequence];
    if (a.sequence[node] != rows.sequence || start < 0 || start > room) return NAN;
    room -= start;
  }
  const int64_t prefix = a.prefix_length[rows.sequence];
  const int behind = a.ancestors == nullptr ? node + 1 - rows.first_node : tree_rows(a, node);
  if (prefix < 0 || prefix > room - behind) return NAN;
  return prefix == 0 && behind == 0 ? 0.0f : 1.0f;
}

// What a row's sum of weighted values is multiplied by, from its sum of weights.
__device__ inline float output_factor(float outcome, float sum) {
  return outcome == 0.0f ? 0.0f : outcome * (1.0f / sum);
}

template <typename T>
__device__ inline void write_output(const AttentionArguments& a, int kv_head, int row, int column, float4 sum,
                                    float factor) {
  T* to =
      static_cast<T*>(a.output) + a.node(row) * a.output_stride[0] + a.head(kv_head, row) * a.output_stride[1] + column;
  // A sum of -0 becomes 0: it may have met a hidden key, which adds 0, or not.
  const float4 o = {(sum.x + 0.0f) * factor, (sum.y + 0.0f) * factor, (sum.z + 0.0f) * factor, (sum.w + 0.0f) * factor};
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
__device__ inline void write_result(const AttentionArguments& a, int split, int kv_head, const BlockRows& rows, int row,
                                    int column, float4 sum, float2 maximum_and_sum) {
  if (a.splits == 1) {
    const float factor = output_factor(row_outcome(a, rows, a.node(row)), maximum_and_sum.y);
    return write_output<T>(a, kv_head, row, column, sum, factor);
  }
  const int64_t at = (int64_t{split} * a.kv_heads + kv_head) * a.rows + row;
  *reinterpret_cast<float4*>(a.partial + at * a.width + column) = sum;
  if (column == 0) a.sums[at] = maximum_and_sum;
}

__device__ inline void write_empty(const AttentionArguments& a, int split, int kv_head, const BlockRows& rows) {
  for (int r = threadIdx.x; r < rows.count; r += attention_threads) {
    const int64_t at = (int64_t{split} * a.kv_heads + kv_head) * a.rows + rows.first + r;
    a.sums[at] = {empty_split, 0.0f};
  }
}

// Adds the values that clear_nonfinite() took away to the results of the rows that see them. Rare and slow: one warp
// for each row, which goes once more through the keys that it sees in the edge tiles.
template <typename T, int keys, typename RowSums>
__device__ inline void add_nonfinite(const AttentionArguments& a, const KeyRange& range, int first_tile, int last_tile,
                                     int split, int kv_head, const BlockRows& rows, const RowSums& row_sums) {
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
#pragma unroll 1
  for (int r = warp; r < rows.count; r += attention_warps) {
    const int row = rows.first + r, node = a.node(row), head = a.head(kv_head, row);
    const float2 sums = row_sums(r);
    const T* query = static_cast<const T*>(a.query) + node * a.query_stride[0] + head * a.query_stride[1];
#pragma unroll 1
    for (int tile = first_tile; tile < last_tile; tile += a.splits) {
      if (!range.is_edge<keys>(tile)) continue;
      uint64_t visible = visible_keys(a, range, node, path_length(a, rows, node), tile * keys);
      if (keys < 64) visible &= low_bits(keys);
#pragma unroll 1
      for (; visible != 0; visible &= visible - 1) {
        int key_row = tile * keys + __ffsll(static_cast<long long>(visible)) - 1;
        if (a.by_position) key_row = cache_row(a, range, node, key_row);
        if (key_row < 0) continue;
        key_row += range.start;
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
            *to = from_float<T>(to_float(*to) + weight * v * output_factor(row_outcome(a, rows, node), sums.y));
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

// Writes the output of a block's rows from their partial results; `sums` is room for [splits, rows] in shared memory.
// Four columns of a row are one thread's: four sums, each of every fourth split, and then the sum of these. A batch of
// loads is on its way at once, because a load takes longer than all that is done with it.
template <typename T>
__device__ inline void merge_splits(const AttentionArguments& a, int kv_head, const BlockRows& rows, float2* sums) {
  constexpr int batch = 16, chains = 4;
  const int count = rows.count;
  const int64_t first = int64_t{kv_head} * a.rows + rows.first, step = int64_t{a.kv_heads} * a.rows;
#pragma unroll 1
  for (int at = threadIdx.x; at < a.splits * count; at += blockDim.x) {
    sums[at] = a.sums[first + at / count * step + at % count];
  }
  __syncthreads();
  const int columns = a.width / 4;
#pragma unroll 1
  for (int at = threadIdx.x; at < count * columns; at += blockDim.x) {
    const int row = at / columns, column = at % columns * 4;
    const float outcome = row_outcome(a, rows, a.node(rows.first + row));
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
    write_output<T>(a, kv_head, rows.first + row, column, total[0], output_factor(outcome, weights[0]));
  }
}

}  // namespace specbranch::cuda

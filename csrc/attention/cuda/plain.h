// Attention in float32 on plain cores: tensor cores would round the inputs.
//
// The threads of a block form a grid of Ty x Tx, a row of it within a warp. A thread has the products of rows / Ty rows
// with keys / Tx keys of a tile in registers, exchanges its weights through shared memory and sums up the same rows'
// values in value_dim / Tx columns. K and V have one buffer each: the next K is on its way while V is used, and V while
// K is. Few rows: 4 x 32 threads, 8 rows, bound by the bytes of K and V; else 8 x 16 threads and 32 (16) rows.
// Above 256 columns there is room for 16 keys and 8 rows only, and 8 x 16 threads take them.
#pragma once

#include "attention/cuda/rows.h"

namespace specbranch::cuda {

template <int Dim, bool wide>
struct PlainShape {
  static constexpr int keys = Dim <= 128 ? 64 : Dim <= 256 ? 32 : 16;  // of a tile
  static constexpr int rows = !wide ? 8 : Dim <= 128 ? 32 : 16;
  static constexpr int across = wide || keys < 32 ? 16 : 32;  // Tx
  static constexpr int thread_rows = rows / (attention_threads / across);
  static constexpr int thread_keys = keys / across;
  static constexpr int thread_columns = Dim / (4 * across);         // times 4
  static constexpr int stride = Dim + 4, weight_stride = keys + 4;  // floats; rows then lie in different banks
  static constexpr int query_floats = rows * stride, tile_floats = keys * stride;
  static constexpr int shared_bytes =
      4 * (query_floats + 2 * tile_floats + rows * (weight_stride + 2 + 2) + 2) + static_cast<int>(sizeof(Paths));
  static_assert(shared_bytes <= attention_shared_bytes, "fits every device");
  static_assert(last_block_sums_bytes <= 4 * (query_floats + 2 * tile_floats), "room to merge");
};

__device__ inline float dot(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

template <int Dim, bool wide>
__global__ void __launch_bounds__(attention_threads, 2) attend_plain(const __grid_constant__ AttentionArguments a) {
  using Shape = PlainShape<Dim, wide>;
  constexpr int keys = Shape::keys, across = Shape::across;
  constexpr int thread_rows = Shape::thread_rows, thread_keys = Shape::thread_keys;
  constexpr int thread_columns = Shape::thread_columns, chunks = Dim / 4;

  float* const queries = shared_memory<float>();
  float* const tile_keys = queries + Shape::query_floats;
  float* const tile_values = tile_keys + Shape::tile_floats;
  float* const weights = tile_values + Shape::tile_floats;
  float2* const all_sums = reinterpret_cast<float2*>(weights + Shape::rows * Shape::weight_stride);
  uint64_t* const visible = reinterpret_cast<uint64_t*>(all_sums + Shape::rows);
  int* const found_nonfinite = reinterpret_cast<int*>(visible + Shape::rows);
  int* const is_last = found_nonfinite + 1;
  Paths& paths = *reinterpret_cast<Paths*>(is_last + 1);
  const auto place = [](int row, int chunk) { return (row * Shape::stride + chunk * 4) * 4; };
  const auto bytes = [](float* p) { return reinterpret_cast<unsigned char*>(p); };

  const int tx = threadIdx.x % across, ty = threadIdx.x / across;
  const int split = blockIdx.y, kv_head = blockIdx.z;
  // A chain's last rows take longest: they go first.
  const BlockRows block = rows_of_block(a, static_cast<int>(gridDim.x - 1 - blockIdx.x), Shape::rows);
  if (block.count == 0) return;
  const int first_row = block.first, count = block.count;
  const RangeLoads loads(a, block);
  const int steps = (a.dim + 3) / 4, value_steps = (a.value_dim + 3) / 4;

  load_queries<float, chunks>(a, kv_head, first_row, count, Shape::rows, bytes(queries), shared_address(queries), place,
                              steps);
  const KeyRange range(a, loads);
  int first_tile, last_tile;
  range.tiles<keys>(split, a.splits, &first_tile, &last_tile);
  const bool empty = first_tile == last_tile && a.splits > 1;
  if (empty) write_empty(a, split, kv_head, block);

  const float* const keys_of_head =
      static_cast<const float*>(a.keys) + kv_head * a.key_stride[0] + range.start * a.key_stride[1];
  const float* const values_of_head =
      static_cast<const float*>(a.values) + kv_head * a.value_stride[0] + range.start * a.value_stride[1];
  const auto rows_of = [&](int i) {
    return has_paths<keys>(a, range, paths.turns[i % 4].tile) ? paths.cache_rows[i % 2] : nullptr;
  };
  const auto load_keys = [&](int i) {
    load_tile<float, chunks, keys>(bytes(tile_keys), shared_address(tile_keys), place, keys_of_head, a.key_stride[1],
                                   paths.turns[i % 4].tile * keys, range.end, rows_of(i), a.dim, steps, a.vector_keys);
  };
  const bool in_use = ty / (warp_size / across) * (warp_size / across) * thread_rows < count;  // the warp has rows
  const bool transformed = must_transform(a);
  const float factor = transformed ? 1.0f : a.factor;

  float4 sums[thread_rows][thread_columns] = {};
  // By key modulo 32, so that the order of the sum, and its bits, are the same in narrow and wide blocks.
  constexpr int key_classes = 32 / across;
  float maximum[thread_rows], weight_sums[thread_rows][key_classes];
#pragma unroll
  for (int r = 0; r < thread_rows; ++r) {
    maximum[r] = lowest;
    for (int c = 0; c < key_classes; ++c) weight_sums[r][c] = 0.0f;
  }
  if (threadIdx.x == 0) {
    *found_nonfinite = 0;
    paths.start(loads, first_tile);
  }

  __syncthreads();
  prepare_turn<keys>(a, range, last_tile, paths, -1);
  __syncthreads();
  if (first_tile < last_tile) load_keys(0);
  cp_async_commit();
#pragma unroll 1
  for (int i = 0; paths.turns[i % 4].tile < last_tile; ++i) {
    cp_async_wait<0>();
    __syncthreads();  // the keys are there, and the values of the tile before are not in use any more
    const Turn turn = paths.turns[i % 4];
    const int tile = turn.tile;
    const bool edge = range.is_edge<keys>(tile);
    if (edge) find_visible<keys>(a, range, paths, block, Shape::rows, turn, visible);
    load_tile<float, chunks, keys>(bytes(tile_values), shared_address(tile_values), place, values_of_head,
                                   a.value_stride[1], tile * keys, range.end, rows_of(i), a.value_dim, value_steps,
                                   a.vector_values);
    cp_async_commit();
    prepare_turn<keys>(a, range, last_tile, paths, i);
    if (edge) __syncthreads();

    if (in_use) {
      float products[thread_rows][thread_keys] = {};
#pragma unroll 4
      for (int step = 0; step < steps; ++step) {
        float4 k[thread_keys];
#pragma unroll
        for (int j = 0; j < thread_keys; ++j) {
          k[j] = *reinterpret_cast<const float4*>(tile_keys + (tx + j * across) * Shape::stride + 4 * step);
        }
#pragma unroll
        for (int r = 0; r < thread_rows; ++r) {
          const float4 q =
              *reinterpret_cast<const float4*>(queries + (ty * thread_rows + r) * Shape::stride + 4 * step);
#pragma unroll
          for (int j = 0; j < thread_keys; ++j) products[r][j] = dot(q, k[j], products[r][j]);
        }
      }
      if (transformed) transform(a, products);
      if (edge) {
#pragma unroll
        for (int r = 0; r < thread_rows; ++r) {
          const uint64_t seen = visible[ty * thread_rows + r] >> tx;
#pragma unroll
          for (int j = 0; j < thread_keys; ++j) {
            if (!(seen >> (j * across) & 1)) products[r][j] = -INFINITY;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < thread_rows; ++r) {
        float top = -INFINITY;
#pragma unroll
        for (int j = 0; j < thread_keys; ++j) top = fmaxf(top, products[r][j]);
#pragma unroll
        for (int step = 1; step < across; step *= 2) top = fmaxf(top, __shfl_xor_sync(all_lanes, top, step));
        const float latest = fmaxf(maximum[r], top * factor);
        const float change = exp2_approximate(maximum[r] - latest);
        if (latest != maximum[r]) {
          maximum[r] = latest;
          for (int c = 0; c < key_classes; ++c) weight_sums[r][c] *= change;
#pragma unroll
          for (int i = 0; i < thread_columns; ++i) {
            float4& sum = sums[r][i];
            sum = {sum.x * change, sum.y * change, sum.z * change, sum.w * change};
          }
        }
#pragma unroll
        for (int j = 0; j < thread_keys; ++j) {
          const float weight = exp2_approximate(fmaf(products[r][j], factor, -latest));
          weight_sums[r][j % key_classes] += weight;
          weights[(ty * thread_rows + r) * Shape::weight_stride + tx + j * across] = weight;
        }
      }
    }

    cp_async_wait<0>();
    __syncthreads();  // the values are there, and the keys are not in use any more
    if (paths.turns[(i + 1) % 4].tile < last_tile) load_keys(i + 1);
    cp_async_commit();
    if (edge) {
      if (clear_nonfinite<float, chunks, keys>(bytes(tile_values), place, value_steps)) *found_nonfinite = 1;
      __syncthreads();
    }
    if (in_use) {
#pragma unroll 2
      for (int k = 0; k < keys; k += 4) {
        float4 w[thread_rows];
#pragma unroll
        for (int r = 0; r < thread_rows; ++r) {
          w[r] = *reinterpret_cast<const float4*>(weights + (ty * thread_rows + r) * Shape::weight_stride + k);
        }
#pragma unroll
        for (int i = 0; i < thread_columns; ++i) {
          const int column = 4 * (tx + i * across);
          if (column >= 4 * value_steps) continue;
          const float* v = tile_values + k * Shape::stride + column;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float4 value = *reinterpret_cast<const float4*>(v + j * Shape::stride);
#pragma unroll
            for (int r = 0; r < thread_rows; ++r) {
              const float weight = j == 0 ? w[r].x : j == 1 ? w[r].y : j == 2 ? w[r].z : w[r].w;
              sums[r][i] = multiply_add(value, weight, sums[r][i]);
            }
          }
        }
      }
    }
  }
  cp_async_wait<0>();

#pragma unroll
  for (int r = 0; r < thread_rows; ++r) {
    float sum = weight_sums[r][0];
    for (int c = 1; c < key_classes; ++c) sum += weight_sums[r][c];
#pragma unroll
    for (int step = across / 2; step > 0; step /= 2) sum += __shfl_xor_sync(all_lanes, sum, step);
    const int row = ty * thread_rows + r;
    if (tx == 0) all_sums[row] = {maximum[r], sum};
    if (row >= count || empty) continue;
#pragma unroll
    for (int i = 0; i < thread_columns; ++i) {
      const int column = 4 * (tx + i * across);
      if (column < a.width) {
        write_result<float>(a, split, kv_head, block, first_row + row, column, sums[r][i], {maximum[r], sum});
      }
    }
  }
  __syncthreads();
  if (*found_nonfinite != 0) {
    add_nonfinite<float, keys>(a, range, first_tile, last_tile, split, kv_head, block,
                               [&](int row) { return all_sums[row]; });
  }
  if (a.tickets == nullptr || !is_last_split(a, kv_head, is_last)) return;
  merge_splits<float>(a, kv_head, block, reinterpret_cast<float2*>(queries));
}

}  // namespace specbranch::cuda

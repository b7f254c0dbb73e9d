// Attention in float16 and bfloat16 on tensor cores.
//
// A block keeps its queries in shared memory and streams tiles of K and V through it, double buffered with asynchronous
// copies: the next tile is on its way while one is used. A warp takes 32 rows (16 for head dimensions above 128, where
// twice the accumulators would not fit the registers), so that each fragment of K and V read from shared memory serves
// two products: with 16 rows, reading them would be slower than the products.
//   wide:   four warps side by side, 128 (64) rows that share a tile, each warp all keys of it. Above 256 two warps of 16
//           rows, and two for each half of the values' columns: the accumulators of all columns would fill every register
//   narrow: one or two warps of rows, and four or two that share the keys of a tile and are merged at the end
// Few rows are padded, not left to plain cores: the bytes of K and V take longer than the products even so.
#pragma once

#include "attention/cuda/rows.h"

namespace specbranch::cuda {

template <int Dim>
struct MmaShape {
  static constexpr int keys = Dim <= 128 ? 64 : Dim <= 256 ? 32 : 16;  // of a tile
  static constexpr int column_warps = Dim <= 256 ? 1 : 2;              // that share a row's columns
  static constexpr int columns = Dim / column_warps;                   // of a warp
  static constexpr int wide_row_warps = attention_warps / column_warps;
  static constexpr int row_tiles = Dim <= 128 ? 2 : 1;  // of 16 rows, for each warp
  static constexpr int warp_rows = 16 * row_tiles;
  static constexpr int row_bytes = 2 * Dim;
  static constexpr int chunks = Dim / 8;
  static constexpr int tile_bytes = keys * row_bytes;
  static constexpr int sum_stride = columns + 8;  // floats; rows of a fragment then lie in different banks

  static constexpr int sums_bytes = attention_warps * warp_rows * sum_stride * 4;
  static constexpr int results_bytes = sums_bytes + attention_warps * warp_rows * static_cast<int>(sizeof(float2));

  // Shared memory: a BlockState and Paths; then queries, two tiles of K and V each, and what the rows see of one, or in
  // the end the results.
  static constexpr int paths_offset = 80, state_bytes = paths_offset + (static_cast<int>(sizeof(Paths)) + 15) / 16 * 16;
  __host__ __device__ static constexpr int shared_bytes(int row_warps) {
    const int streaming = row_warps * warp_rows * (row_bytes + static_cast<int>(sizeof(uint64_t))) + 4 * tile_bytes;
    return state_bytes + (streaming > results_bytes ? streaming : results_bytes);
  }

  // Eight rows of a matrix that ldmatrix reads lie in different banks: chunks are exchanged within groups of 8 (of 4,
  // where 8 do not divide a row).
  static constexpr int exchanged_chunks = chunks % 8 == 0 ? 8 : 4;
  __device__ static constexpr int exchange(int row) {
    return (exchanged_chunks == 8 ? row : row / 2) % exchanged_chunks;
  }
  __device__ static constexpr int place(int row, int chunk) { return row * row_bytes + (chunk ^ exchange(row)) * 16; }

  // The offset of chunk 2 * step (+ 1) of a row, from that of chunk 0 (1).
  __device__ static constexpr int along(int start, int step) {
    constexpr int low = exchanged_chunks * 16 - 1;
    return (start ^ (step * 32 & low)) + (step * 32 & ~low);
  }
};

// What all threads of a block know, kept out of their registers.
struct BlockState {
  KeyRange range;
  int first_tile, last_tile;
  BlockRows rows;
  int found_nonfinite, is_last;
  const void *keys, *values;  // of its head, from the start of its sequence on
};

template <typename T, int Dim, bool wide>
__global__ void __launch_bounds__(attention_threads, 2)
    attend_mma(const __grid_constant__ AttentionArguments a, int narrow_row_warps) {
  using Shape = MmaShape<Dim>;
  constexpr int keys = Shape::keys, row_tiles = Shape::row_tiles, warp_rows = Shape::warp_rows;
  constexpr int groups = wide ? keys / 16 : 1;  // of 16 keys, that one softmax step takes

  static_assert(sizeof(BlockState) <= Shape::paths_offset, "room for the state");
  static_assert(Shape::shared_bytes(wide ? Shape::wide_row_warps : 2) <= attention_shared_bytes, "fits every device");
  static_assert(Shape::state_bytes + last_block_sums_bytes <= Shape::shared_bytes(wide ? Shape::wide_row_warps : 1),
                "room to merge");
  BlockState& state = *shared_memory<BlockState>();
  Paths& paths = *reinterpret_cast<Paths*>(shared_memory<unsigned char>() + Shape::paths_offset);
  const KeyRange& range = state.range;
  unsigned char* const memory = shared_memory<unsigned char>() + Shape::state_bytes;
  const SharedAddress address = shared_address(memory);
  const auto place = [](int row, int chunk) { return Shape::place(row, chunk); };

  constexpr int column_warps = Shape::column_warps, columns = Shape::columns;
  const int row_warps = wide ? Shape::wide_row_warps : narrow_row_warps;
  const int key_warps = attention_warps / column_warps / row_warps;
  const int warp = threadIdx.x / warp_size, row_warp = warp % row_warps;
  const int column_warp = warp / row_warps % column_warps, key_warp = warp / row_warps / column_warps;
  const int block_rows = row_warps * warp_rows;
  const int split = blockIdx.y, kv_head = blockIdx.z;
  // A chain's last rows take longest: they go first.
  const BlockRows rows = rows_of_block(a, static_cast<int>(gridDim.x - 1 - blockIdx.x), block_rows);
  if (rows.count == 0) return;
  const int count = rows.count;
  const RangeLoads loads(a, rows);
  // In steps of 16 columns. A wide kernel is compiled for its head dimension; the narrow one leaves out what a smaller
  // one does not need, four steps at once, so that their loads need not wait for each other.
  const int steps = wide ? Dim / 16 : (a.dim + 63) / 64 * 4;
  const int value_steps = wide ? Dim / 16 : (a.value_dim + 63) / 64 * 4;

  load_queries<T, Shape::chunks>(a, kv_head, rows.first, count, block_rows, memory, address, place, 2 * steps);
  if (threadIdx.x < warp_size) {
    const KeyRange found(a, loads);
    int first, last;
    found.tiles<keys>(split, a.splits, &first, &last);
    if (threadIdx.x == 0) {
      state = {found,
               first,
               last,
               rows,
               0,
               0,
               static_cast<const T*>(a.keys) + kv_head * a.key_stride[0] + found.start * a.key_stride[1],
               static_cast<const T*>(a.values) + kv_head * a.value_stride[0] + found.start * a.value_stride[1]};
      paths.start(loads, first);
    }
  }
  __syncthreads();

  const int tiles_offset = block_rows * Shape::row_bytes;
  uint64_t* const visible = reinterpret_cast<uint64_t*>(memory + tiles_offset + 4 * Shape::tile_bytes);

  const auto in_use = [&](int m) { return wide || m == 0 || count > 16; };  // false where the block has no rows
  const bool transformed = must_transform(a);
  const float factor = transformed ? 1.0f : a.factor;

  float sums[row_tiles][columns / 8][4] = {};
  float weight_sums[row_tiles][4] = {};  // as one more column of values that is all ones, summed up on tensor cores too
  float maximum[row_tiles][2];
#pragma unroll
  for (int m = 0; m < row_tiles; ++m) maximum[m][0] = maximum[m][1] = lowest;

  const auto load = [&](int tile, int i) {
    const int to = tiles_offset + i % 2 * 2 * Shape::tile_bytes;
    const int* rows = has_paths<keys>(a, range, tile) ? paths.cache_rows[i % 2] : nullptr;
    load_tile<T, Shape::chunks, keys>(memory + to, address + to, place, static_cast<const T*>(state.keys),
                                      a.key_stride[1], tile * keys, range.end, rows, a.dim, 2 * steps, a.vector_keys);
    load_tile<T, Shape::chunks, keys>(memory + to + Shape::tile_bytes, address + to + Shape::tile_bytes, place,
                                      static_cast<const T*>(state.values), a.value_stride[1], tile * keys, range.end,
                                      rows, a.value_dim, 2 * value_steps, a.vector_values);
  };
  // Turn -1 only asks for the first tile: a second place that does would take registers here.
#pragma unroll 1
  for (int i = -1; i < 0 || paths.turns[i % 4].tile < state.last_tile; ++i) {
    prepare_turn<keys>(a, range, state.last_tile, paths, i);
    if (i >= 0) {
      cp_async_commit();
      cp_async_wait<0>();
    }
    __syncthreads();  // the tile is there, and the buffer of the one before is free
    if (const int next = paths.turns[(i + 1) % 4].tile; next < state.last_tile) load(next, i + 1);
    if (i < 0) continue;

    const Turn turn = paths.turns[i % 4];
    const int tile = turn.tile;
    const int tile_keys = tiles_offset + i % 2 * 2 * Shape::tile_bytes;
    const int tile_values = tile_keys + Shape::tile_bytes;
    if (range.is_edge<keys>(tile)) {
      find_visible<keys>(a, range, paths, state.rows, block_rows, turn, visible);
      if (clear_nonfinite<T, Shape::chunks, keys>(memory + tile_values, place, 2 * value_steps)) {
        state.found_nonfinite = 1;
      }
      __syncthreads();
    }
    const int lane = thread_again() % warp_size;
    if (state.rows.count <= row_warp * warp_rows) continue;  // the warp has no rows

    // The lane gives ldmatrix the address of one row, eight columns wide, of the four matrices that make up 16 x 16.
    // They are taken column by column for queries and values, row by row for keys: a factor's registers are neighbours.
    const int lane_row = lane % 16, lane_start = (lane / 16 ^ Shape::exchange(lane_row)) * 16;
    const int lane_key = lane % 8 + lane / 16 * 8, lane_key_start = (lane / 8 % 2 ^ Shape::exchange(lane_key)) * 16;
    const SharedAddress my_queries = address + (row_warp * warp_rows + lane_row) * Shape::row_bytes;

    for (int first_key = wide ? 0 : key_warp * 16; first_key < keys; first_key += wide ? keys : key_warps * 16) {
      // Products of queries and keys.
      float products[row_tiles][2 * groups][4] = {};
      const SharedAddress my_keys = address + tile_keys + (first_key + lane_key) * Shape::row_bytes;
#pragma unroll
      for (int step = 0; step < Dim / 16; ++step) {
        if (!wide && step % 4 == 0 && step >= steps) break;
        uint32_t q[row_tiles][4];
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) {
          if (in_use(m)) ldmatrix_x4(q[m], my_queries + m * 16 * Shape::row_bytes + Shape::along(lane_start, step));
        }
#pragma unroll
        for (int g = 0; g < groups; ++g) {
          uint32_t k[4];
          ldmatrix_x4(k, my_keys + g * 16 * Shape::row_bytes + Shape::along(lane_key_start, step));
          const uint32_t left[2] = {k[0], k[1]}, right[2] = {k[2], k[3]};
#pragma unroll
          for (int m = 0; m < row_tiles; ++m) {
            if (!in_use(m)) continue;
            mma_m16n8k16<T>(products[m][2 * g], q[m], left);
            mma_m16n8k16<T>(products[m][2 * g + 1], q[m], right);
          }
        }
      }

      // Weights. The lane holds rows lane / 4 and lane / 4 + 8 of each row tile, and of every eight keys the two that
      // start at 2 * (lane % 4).
      if (transformed) {
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) transform(a, products[m]);
      }
      if (range.is_edge<keys>(read_again(paths.turns[i % 4].tile))) {
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint64_t seen =
                visible[row_warp * warp_rows + m * 16 + half * 8 + lane / 4] >> (first_key + 2 * (lane % 4));
#pragma unroll
            for (int j = 0; j < 2 * groups; ++j) {
              if (!(seen >> (8 * j) & 1)) products[m][j][2 * half] = -INFINITY;
              if (!(seen >> (8 * j) & 2)) products[m][j][2 * half + 1] = -INFINITY;
            }
          }
        }
      }
      float change[row_tiles][2];
      bool rescale = false;
#pragma unroll
      for (int m = 0; m < row_tiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float top = -INFINITY;
#pragma unroll
          for (int j = 0; j < 2 * groups; ++j) {
            top = fmaxf(top, fmaxf(products[m][j][2 * half], products[m][j][2 * half + 1]));
          }
          top = fmaxf(top, __shfl_xor_sync(all_lanes, top, 1));
          top = fmaxf(top, __shfl_xor_sync(all_lanes, top, 2));
          const float old = maximum[m][half], latest = fmaxf(old, top * factor);
          change[m][half] = exp2_approximate(old - latest);
          maximum[m][half] = latest;
          rescale |= latest != old;
        }
      }
      // Once a row's maximum has settled there is nothing to rescale.
      if (__any_sync(all_lanes, rescale)) {
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) weight_sums[m][i] *= change[m][i / 2];
#pragma unroll
          for (int j = 0; j < columns / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][j][i] *= change[m][i / 2];
          }
        }
      }

      uint32_t weights[row_tiles][groups][4];
#pragma unroll
      for (int m = 0; m < row_tiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int j = 0; j < 2 * groups; ++j) {
            const float left = exp2_approximate(fmaf(products[m][j][2 * half], factor, -maximum[m][half]));
            const float right = exp2_approximate(fmaf(products[m][j][2 * half + 1], factor, -maximum[m][half]));
            weights[m][j / 2][j % 2 * 2 + half] = pack<T>(left, right);
          }
        }
      }
      // Weights times values: the lane's weights are its part of the left factor.
      const uint32_t ones[2] = {pack<T>(1.0f, 1.0f), pack<T>(1.0f, 1.0f)};
      const SharedAddress my_values =
          address + tile_values + (first_key + lane_row) * Shape::row_bytes + column_warp * columns * 2;
#pragma unroll
      for (int g = 0; g < groups; ++g) {
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) mma_m16n8k16<T>(weight_sums[m], weights[m][g], ones);
#pragma unroll
        for (int step = 0; step < columns / 16; ++step) {
          if (!wide && step % 4 == 0 && step >= value_steps) break;
          uint32_t v[4];
          ldmatrix_x4_trans(v, my_values + g * 16 * Shape::row_bytes + Shape::along(lane_start, step));
          const uint32_t left[2] = {v[0], v[1]}, right[2] = {v[2], v[3]};
#pragma unroll
          for (int m = 0; m < row_tiles; ++m) {
            if (!in_use(m)) continue;
            mma_m16n8k16<T>(sums[m][2 * step], weights[m][g], left);
            mma_m16n8k16<T>(sums[m][2 * step + 1], weights[m][g], right);
          }
        }
      }
    }
  }

  // Results through shared memory: warps that shared the keys are merged, and rows are written whole. What this needs
  // is read anew: registers are scarce in the loop above.
  float* const all_sums = reinterpret_cast<float*>(memory);
  float2* const all_weights = reinterpret_cast<float2*>(memory + Shape::sums_bytes);
  const int thread = thread_again();
  cp_async_commit();
  cp_async_wait<0>();  // without a tile, the queries are still on their way
  __syncthreads();
#pragma unroll
  for (int m = 0; m < row_tiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int slot = thread / warp_size * warp_rows + m * 16 + half * 8 + thread % warp_size / 4;
      if (thread % 4 == 0) all_weights[slot] = {maximum[m][half], weight_sums[m][2 * half]};
#pragma unroll
      for (int j = 0; j < columns / 8; ++j) {
        *reinterpret_cast<float2*>(all_sums + slot * Shape::sum_stride + 8 * j + 2 * (thread % 4)) = {
            sums[m][j][2 * half], sums[m][j][2 * half + 1]};
      }
    }
  }
  __syncthreads();

  const auto slot_of = [&](int row, int k, int half = 0) {  // half: of the columns
    return ((k * column_warps + half) * row_warps + row / warp_rows) * warp_rows + row % warp_rows;
  };
  const auto row_sums = [&](int row) {
    float top = lowest, sum = 0.0f;
    for (int k = 0; k < key_warps; ++k) top = fmaxf(top, all_weights[slot_of(row, k)].x);
    for (int k = 0; k < key_warps; ++k) {
      const float2 part = all_weights[slot_of(row, k)];
      sum = fmaf(part.y, exp2_approximate(part.x - top), sum);
    }
    return float2{top, sum};
  };
  const bool empty = state.first_tile == state.last_tile && a.splits > 1;
  if (empty) write_empty(a, split, kv_head, state.rows);
  const int quads = a.width / 4, items = empty ? 0 : state.rows.count * quads;
#pragma unroll 1
  for (int at = thread; at < items; at += attention_threads) {
    const int row = at / quads, column = at % quads * 4;
    const float2 total = row_sums(row);
    float4 sum = {};
    for (int k = 0; k < key_warps; ++k) {
      const int slot = slot_of(row, k, column / columns);
      const float share = exp2_approximate(all_weights[slot].x - total.x);
      const float4 part = *reinterpret_cast<const float4*>(all_sums + slot * Shape::sum_stride + column % columns);
      sum = multiply_add(part, share, sum);
    }
    write_result<T>(a, split, kv_head, state.rows, state.rows.first + row, column, sum, total);
  }
  if (state.found_nonfinite != 0) {
    __syncthreads();
    add_nonfinite<T, keys>(a, range, state.first_tile, state.last_tile, split, kv_head, state.rows, row_sums);
  }
  if (a.tickets == nullptr || !is_last_split(a, kv_head, &state.is_last)) return;
  merge_splits<T>(a, kv_head, state.rows, reinterpret_cast<float2*>(memory));
}

}  // namespace specbranch::cuda

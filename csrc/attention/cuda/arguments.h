// What an attention kernel is asked for.
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
  const int64_t *starts, *sequence;  // null: one sequence, from row 0 on
  const uint64_t* ancestors;         // null: a chain
  // In items.
  int64_t query_stride[2], key_stride[2], value_stride[2], output_stride[2], ancestor_stride;
  int heads_per_kv, kv_heads, rows;  // rows: of one KV head
  int sequences;
  int dim, value_dim, width;  // width: value_dim rounded up to 4
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

}  // namespace specbranch::cuda

// Rows of several texts: a block's are of one.
#pragma once

#include "attention/cuda/arguments.h"
#include "core/bits.h"

namespace specbranch::cuda {

struct BlockRows {
  int first, count;
  int sequence, first_node;  // what they belong to, and its first node
};

// How many blocks cover all rows, wherever a sequence ends.
inline int64_t block_count(const AttentionArguments& a, int64_t block_rows) {
  const int64_t nodes = a.rows / a.heads_per_kv, sequences = std::min<int64_t>(a.sequences, nodes);
  return (a.rows + sequences * (block_rows - 1)) / block_rows;
}

// The rows of one of them; none, where fewer do. Takes whole warps.
//
// a.sequence comes from device memory and may hold anything: a node counts to the highest sequence up to it, so that the
// blocks cover every row, and what becomes of the row is said by row_outcome.
__device__ inline BlockRows rows_of_block(const AttentionArguments& a, int block, int block_rows) {
  if (a.sequence == nullptr) {
    const int first = block * block_rows;
    return {first, min(block_rows, a.rows - first), 0, 0};
  }
  const int lane = threadIdx.x % warp_size, nodes = a.rows / a.heads_per_kv;
  int sequence = 0, first = 0;  // of the sequence that goes on
#pragma unroll 1
  for (int from = 0; from <= nodes; from += warp_size) {
    const int node = from + lane;
    int highest = a.sequences;  // behind the last node: another one
    if (node < nodes) {
      const int64_t number = min(a.sequence[node], int64_t{a.sequences - 1});
      highest = max(static_cast<int>(max(number, int64_t{0})), sequence);
    }
    for (int step = 1; step < warp_size; step *= 2) {
      const int before = __shfl_up_sync(all_lanes, highest, step);
      if (lane >= step) highest = max(highest, before);
    }
    int before = __shfl_up_sync(all_lanes, highest, 1);
    if (lane == 0) before = sequence;
    unsigned ends = __ballot_sync(all_lanes, highest != before);
#pragma unroll 1
    for (; ends != 0; ends &= ends - 1) {
      const int at = __ffs(static_cast<int>(ends)) - 1, rows = (from + at - first) * a.heads_per_kv;
      sequence = __shfl_sync(all_lanes, before, at);
      const int blocks = (rows + block_rows - 1) / block_rows;
      if (block < blocks) {
        const int done = block * block_rows;
        return {first * a.heads_per_kv + done, min(block_rows, rows - done), sequence, first};
      }
      block -= blocks;
      first = from + at;
    }
    sequence = __shfl_sync(all_lanes, highest, warp_size - 1);
  }
  return {0, 0, 0, 0};
}

}  // namespace specbranch::cuda

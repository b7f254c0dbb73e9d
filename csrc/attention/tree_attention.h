// Attention of the nodes of a speculation tree to a committed prefix and to their own ancestors.
#pragma once

#include "core/tensor.h"

namespace specbranch {

// One KV cache layer holds the prefix in rows [0, prefix_length) and the tree in the rows behind it. Every query
// sees the prefix; query i sees tree row j iff bit j of ancestors[i] is set (bit j of word j / 64).
//
// Or the layer is a flat buffer of s texts, the sequences. Each has its own prefix and tree, which begin at row starts[q]
// of the buffer; they may overlap. A query sees its own sequence alone, as if that began at row 0.
struct TreeAttentionParams {
  Launch launch;
  Tensor query;          // [n, Hq, D] float32, bfloat16 or float16; all strides but the last are free
  Tensor keys;           // [Hkv, C, D], query's dtype
  Tensor values;         // [Hkv, C, Dv]
  Tensor prefix_length;  // [] int64, or [s] if ragged
  bool chain = true;     // a sequence's query i sees tree rows 0 .. i, and there are no ancestors
  Tensor ancestors;      // [n, words] int64
  bool ragged = false;   // there are starts and sequence, else one sequence that begins at row 0
  Tensor starts;         // [s] int64
  Tensor sequence;       // [n] int64, contiguous: every query's sequence, non-decreasing
  Tensor output;         // [n, Hq, Dv], written
  double scale = 1.0;
  int64_t sliding_window = 0;  // a key is visible iff it is fewer than this many positions back; 0: all are
  double softcap = 0.0;        // scores become softcap * tanh(score / softcap); 0: they stay
  // On CUDA: whether sums take a query's keys in the order of positions, so that its bits do not depend on where in the
  // tree's rows its ancestors lie. Else in the order of rows. The CPU's sums always are by position.
  bool by_position = true;
};

// Throws std::invalid_argument naming the tensor and what was expected.
void check_tree_attention(const TreeAttentionParams& params);

// How many tree rows queries [first, first + nodes) of one sequence see: one more than the highest ancestor bit. In host
// memory.
int64_t tree_rows(const TreeAttentionParams& params, int64_t first, int64_t nodes);

// The parameters must have passed the check.
void run_tree_attention(const TreeAttentionParams& params);

namespace cuda {
// Bytes of workspace for a cache of `capacity` rows.
int64_t tree_attention_workspace(int64_t nodes, int64_t query_heads, int64_t kv_heads, int64_t value_dim,
                                 int64_t capacity);
}  // namespace cuda

}  // namespace specbranch

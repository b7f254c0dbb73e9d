// tree_attention's checks and the choice of its kernel.
#include "attention/tree_attention.h"

#include <algorithm>
#include <cmath>

#include "core/dispatch.h"

namespace specbranch {
namespace {

int64_t ancestor_rows(const Tensor& ancestors) {
  int64_t rows = 0;
  for (int64_t i = 0; i < ancestors.shape[0]; ++i) {
    const int64_t* words = ancestors.as<const int64_t>() + i * ancestors.stride[0];
    int64_t w = ancestors.shape[1];
    while (w > 0 && words[w - 1] == 0) --w;
    if (w == 0) {
      fail("ancestors: expected every row to have its node's own bit, but row " + std::to_string(i) + " is zero");
    }
    rows = std::max(rows, 64 * w - __builtin_clzll(static_cast<uint64_t>(words[w - 1])));
  }
  return rows;
}

}  // namespace

int64_t check_tree_attention(const TreeAttentionParams& p) {
  const Tensor &query = p.query, &keys = p.keys, &values = p.values;
  check_shape(query, {-1, -1, -1}, "[n, Hq, D]");
  check_float(query);
  check_last_dim_contiguous(query);
  check_shape(keys, {-1, -1, query.shape[2]}, "[Hkv, C, D]");
  check_dtype(keys, query.dtype);
  check_last_dim_contiguous(keys);
  check_shape(values, {keys.shape[0], keys.shape[1], -1}, "[Hkv, C, Dv]");
  check_dtype(values, query.dtype);
  check_last_dim_contiguous(values);
  check_shape(p.output, {query.shape[0], query.shape[1], values.shape[2]}, "[n, Hq, Dv]");
  check_dtype(p.output, query.dtype);
  check_last_dim_contiguous(p.output);
  if (query.shape[2] < 1) fail("query: expected at least one element per head, got shape " + shape_text(query));
  if (keys.shape[0] < 1 || query.shape[1] < 1 || query.shape[1] % keys.shape[0] != 0) {
    fail("query: expected Hq to be a multiple of Hkv, got " + std::to_string(query.shape[1]) + " query heads and " +
         std::to_string(keys.shape[0]) + " heads in keys");
  }
  if (p.prefix_length.dims != 0) fail("prefix_length: expected shape [], got " + shape_text(p.prefix_length));
  check_dtype(p.prefix_length, Dtype::int64);
  if (!p.chain) {
    check_shape(p.ancestors, {query.shape[0], -1}, "[n, words]");
    check_dtype(p.ancestors, Dtype::int64);
    check_last_dim_contiguous(p.ancestors);
  }
  if (p.sliding_window < 0) fail("sliding_window: expected at least 1, got " + std::to_string(p.sliding_window));
  if (!(std::abs(p.scale) <= 1e38)) {
    fail("scale: expected a finite number, up to 1e38, got " + number_text(p.scale));
  }
  if (p.softcap != 0.0 && !(p.softcap >= 1e-38)) {
    fail("softcap: expected None or a number from 1e-38 up, got " + number_text(p.softcap));
  }
  if (p.launch.on_cuda()) return 0;  // the kernel reads the rest itself, and no row beyond the capacity
  const int64_t rows = p.chain ? query.shape[0] : ancestor_rows(p.ancestors);
  const int64_t prefix = *p.prefix_length.as<const int64_t>(), capacity = keys.shape[1];
  if (prefix < 0) fail("prefix_length: expected at least 0, got " + std::to_string(prefix));
  if (prefix > capacity - rows) {
    fail(std::string(p.chain ? "query" : "ancestors") + ": expected prefix_length + tree rows to fit keys' " +
         std::to_string(capacity) + " rows, got " + std::to_string(prefix) + " + " + std::to_string(rows));
  }
  return rows;
}

SPECBRANCH_DISPATCH(tree_attention, TreeAttentionParams)

}  // namespace specbranch

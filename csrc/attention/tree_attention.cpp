// tree_attention's checks and the choice of its kernel.
#include "attention/tree_attention.h"

#include <algorithm>
#include <cmath>

#include "core/dispatch.h"

namespace specbranch {
namespace {

void check_vector(const Tensor& t, int64_t count, const char* shape) {
  check_shape(t, {count}, shape);
  check_dtype(t, Dtype::int64);
  check_contiguous(t);
}

// The arguments that say where texts lie.
void check_sequences(const TreeAttentionParams& p) {
  if (!p.ragged) {
    if (p.prefix_length.dims != 0) fail("prefix_length: expected shape [], got " + shape_text(p.prefix_length));
    return check_dtype(p.prefix_length, Dtype::int64);
  }
  const int64_t nodes = p.query.shape[0];
  check_vector(p.starts, -1, "[s]");
  check_vector(p.prefix_length, p.starts.shape[0], "[s]");
  check_vector(p.sequence, nodes, "[n]");
  if (nodes > 0 && p.starts.shape[0] == 0) fail("starts: expected a sequence for every query, got none");
}

// That sequence q has its rows in the cache, of which the queries' begin with `first`.
void check_rows(const TreeAttentionParams& p, int64_t q, int64_t first, int64_t nodes) {
  const int64_t rows = tree_rows(p, first, nodes), capacity = p.keys.shape[1];
  const int64_t start = p.ragged ? p.starts.as<const int64_t>()[q] : 0;
  const int64_t prefix = p.prefix_length.as<const int64_t>()[q];
  const std::string of = p.ragged ? " of sequence " + std::to_string(q) : "";
  if (start < 0 || start > capacity) {
    fail("starts: expected 0 to " + std::to_string(capacity) + ", the rows of keys, got " + std::to_string(start) + of);
  }
  if (prefix < 0) fail("prefix_length: expected at least 0, got " + std::to_string(prefix) + of);
  if (prefix <= capacity - start - rows) return;
  const char* const name = rows == 0 ? "prefix_length" : p.chain ? "query" : "ancestors";
  const std::string before = p.ragged ? std::to_string(start) + " + " : "";
  fail(std::string(name) + ": expected " + (p.ragged ? "starts + " : "") + "prefix_length + tree rows to fit keys' " +
       std::to_string(capacity) + " rows, got " + before + std::to_string(prefix) + " + " + std::to_string(rows) + of);
}

}  // namespace

int64_t tree_rows(const TreeAttentionParams& p, int64_t first, int64_t nodes) {
  if (p.chain) return nodes;
  int64_t rows = 0;
  for (int64_t i = first; i < first + nodes; ++i) {
    const int64_t* words = p.ancestors.as<const int64_t>() + i * p.ancestors.stride[0];
    int64_t w = p.ancestors.shape[1];
    while (w > 0 && words[w - 1] == 0) --w;
    if (w == 0) {
      fail("ancestors: expected every row to have its node's own bit, but row " + std::to_string(i) + " is zero");
    }
    rows = std::max(rows, 64 * w - __builtin_clzll(static_cast<uint64_t>(words[w - 1])));
  }
  return rows;
}

void check_tree_attention(const TreeAttentionParams& p) {
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
  check_sequences(p);
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
  if (p.launch.on_cuda()) return;  // the kernel reads the rest itself, and no row beyond the capacity
  const int64_t nodes = query.shape[0], count = p.ragged ? p.starts.shape[0] : 1;
  const int64_t* sequence = p.ragged ? p.sequence.as<const int64_t>() : nullptr;
  int64_t first = 0;
  for (int64_t q = 0; q < count; ++q) {
    int64_t end = p.ragged ? first : nodes;
    while (end < nodes && sequence[end] == q) ++end;
    check_rows(p, q, first, end - first);
    first = end;
  }
  if (first < nodes) {
    fail("sequence: expected numbers from 0 to " + std::to_string(count - 1) + " that do not decrease, but row " +
         std::to_string(first) + " is " + std::to_string(sequence[first]));
  }
}

SPECBRANCH_DISPATCH(tree_attention, TreeAttentionParams)

}  // namespace specbranch

// rotary_commit's checks and the choice of its kernel.
#include "attention/rotary_commit.h"

#include "core/dispatch.h"

namespace specbranch {
namespace {

// Rows that share memory would overwrite each other.
void check_rows_apart(const Tensor& cache) {
  for (int i = 0; i < 2; ++i) {
    if (cache.shape[i] > 1 && cache.stride[i] < cache.shape[2] && !is_empty(cache)) {
      fail(std::string(cache.name) + ": expected rows in memory of their own, got stride " +
           std::to_string(cache.stride[i]) + " in dimension " + std::to_string(i));
    }
  }
}

void check_norm(const Tensor& norm, const Tensor& query) {
  check_shape(norm, {query.shape[2]}, "[D]");
  check_dtype(norm, query.dtype);
  check_last_dim_contiguous(norm);
}

}  // namespace

void check_rotary_commit(const RotaryCommitParams& p) {
  const Tensor &query = p.query, &key = p.key, &value = p.value, &cos = p.cos, &keys = p.keys;
  check_shape(query, {-1, -1, -1}, "[n, Hq, D]");
  check_float(query);
  check_last_dim_contiguous(query);
  const int64_t n = query.shape[0], dim = query.shape[2];
  check_shape(key, {n, -1, dim}, "[n, Hkv, D]");
  check_dtype(key, query.dtype);
  check_last_dim_contiguous(key);
  check_shape(value, {n, key.shape[1], -1}, "[n, Hkv, Dv]");
  check_dtype(value, query.dtype);
  check_last_dim_contiguous(value);

  check_shape(cos, {n, -1}, "[n, R]");
  const int64_t rotary_dim = cos.shape[1];
  if (rotary_dim < 2 || rotary_dim % 2 != 0 || rotary_dim > dim) {
    fail("cos: expected [n, R] with an even R from 2 to D = " + std::to_string(dim) + ", got " + shape_text(cos));
  }
  if (cos.dtype != Dtype::float32) check_dtype(cos, query.dtype);
  check_last_dim_contiguous(cos);
  check_shape(p.sin, {n, rotary_dim}, "[n, R]");
  check_dtype(p.sin, cos.dtype);
  check_last_dim_contiguous(p.sin);

  check_shape(p.rows, {n}, "[n]");
  check_dtype(p.rows, Dtype::int64);
  check_contiguous(p.rows);
  check_shape(keys, {key.shape[1], -1, dim}, "[Hkv, C, D]");
  check_dtype(keys, query.dtype);
  check_last_dim_contiguous(keys);
  check_rows_apart(keys);
  check_shape(p.values, {key.shape[1], keys.shape[1], value.shape[2]}, "[Hkv, C, Dv]");
  check_dtype(p.values, query.dtype);
  check_last_dim_contiguous(p.values);
  check_rows_apart(p.values);

  if (p.normed) {
    check_norm(p.query_norm, query);
    check_norm(p.key_norm, query);
  }
  if (!(p.eps >= 0.0 && p.eps <= 1e38)) fail("eps: expected a number from 0 to 1e38, got " + number_text(p.eps));
  check_shape(p.output, {n, query.shape[1], dim}, "[n, Hq, D]");
  check_dtype(p.output, query.dtype);
  check_contiguous(p.output);
  if (p.launch.on_cuda()) return;  // the kernel writes no row that is out of range

  const int64_t* rows = p.rows.as<const int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    if (rows[i] < 0 || rows[i] >= keys.shape[1]) {
      fail("rows: expected rows of keys, 0 to " + std::to_string(keys.shape[1] - 1) + ", got " +
           std::to_string(rows[i]));
    }
  }
}

SPECBRANCH_DISPATCH(rotary_commit, RotaryCommitParams)

}  // namespace specbranch

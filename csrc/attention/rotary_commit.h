// rotary_commit: the rotary embedding of queries and keys, after a norm of every head where a model has one, and the
// write of keys and values at their rows of a cache.
#pragma once

#include "core/tensor.h"

namespace specbranch {

// The sum of squares of a head is kept in so many partial sums: the one of index i takes the elements i, i + 32, ... in
// order. Then the upper half is added to the lower one until one is left.
constexpr int head_partial_sums = 32;

struct RotaryCommitParams {
  Launch launch;
  Tensor query;  // [n, Hq, D] float32, bfloat16 or float16; in all tensors of floats only the last stride is not free
  Tensor key;    // [n, Hkv, D], query's dtype
  Tensor value;  // [n, Hkv, Dv]
  Tensor cos, sin;      // [n, R] of query's dtype, or float32: then nothing is rounded before the end
  Tensor rows;          // int64 [n], where in the cache each row goes
  Tensor keys;          // [Hkv, C, D], written at the rows
  Tensor values;        // [Hkv, C, Dv], written at the rows
  bool normed = false;  // whether there are the next two
  Tensor query_norm;    // [D], the weight of the RMS norm of every head
  Tensor key_norm;      // [D]
  Tensor output;        // [n, Hq, D], contiguous, written: the embedded query
  double eps = 1e-6;
  bool unit_offset = false;  // the norm multiplies by 1 + weight
  bool round_first = true;   // what the norm multiplies by its weight is rounded to the dtype before
  bool interleaved = false;  // elements 2i and 2i + 1 are a pair; else i and i + R / 2
};

// Throws std::invalid_argument naming the tensor and what was expected.
void check_rotary_commit(const RotaryCommitParams& params);

// The parameters must have passed the check.
void run_rotary_commit(const RotaryCommitParams& params);

}  // namespace specbranch

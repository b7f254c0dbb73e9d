// kv_commit: moves the rows of an accepted path behind the committed prefix, in place, in every buffer of a cache.
#pragma once

#include "core/tensor.h"

namespace specbranch {

struct KvCommitParams {
  Launch launch;
  const Tensor* buffers = nullptr;  // [buffer_count], each [Hkv, C, D] of any dtype; head and row strides are free
  int64_t buffer_count = 0;
  Tensor rows;   // int64 [m], where the path's rows lie now
  Tensor start;  // int64 [], row i of the path goes to start + i; or [m], it goes to start[i]
};

// Throws std::invalid_argument naming the tensor and what was expected.
void check_kv_commit(const KvCommitParams& params);

// The parameters must have passed the check. new[:, start + i] = old[:, rows[i]], or start[i]; source and destination
// may overlap.
void run_kv_commit(const KvCommitParams& params);

}  // namespace specbranch

// Rows of a packed weight, as they were.
#pragma once

#include "linear/packed_weight.h"

namespace specbranch {

struct UnpackRowsParams {
  Launch launch;
  PackedWeight packed;
  Tensor rows;    // int64 [n], contiguous
  Tensor output;  // bfloat16 [n, in], contiguous, written
};

void check_unpack_rows(const UnpackRowsParams& params);
void run_unpack_rows(const UnpackRowsParams& params);

}  // namespace specbranch

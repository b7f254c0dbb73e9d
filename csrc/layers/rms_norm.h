// rms_norm: rows scaled to a mean square of 1 and then by a weight, with the residual's addition before it.
#pragma once

#include "core/tensor.h"

namespace specbranch {

struct RmsNormParams {
  Launch launch;
  Tensor input;   // [..., H], contiguous; float32, bfloat16 or float16, as the other tensors
  Tensor weight;  // [H], contiguous
  bool has_residual = false;
  Tensor residual;  // as input, where there is one
  double eps = 0.0;
  bool unit_offset = false;  // the factor is 1 + weight
  bool round_first = false;  // the scaled row is rounded to the tensors' dtype before it meets the weight
  Tensor output;             // as input, written
  Tensor sum;                // as input, written: residual + input, rounded. [0] without a residual
};

// The squares of a row are added in one order everywhere, in float32. Partial sum j takes the elements j, j + 1024,
// j + 2048, ... one after the other; then the upper half of the partial sums is added to the lower, until one is left.
// A partial sum without elements is 0 and changes nothing.
constexpr int partial_sums = 1024;

// Throws std::invalid_argument naming the tensor and what was expected.
void check_rms_norm(const RmsNormParams& params);

// The parameters must have passed the check.
void run_rms_norm(const RmsNormParams& params);

}  // namespace specbranch

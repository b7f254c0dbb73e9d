// packed_linear: y = x W^T + b over a packed weight, bit for bit what `linear` gives for the weight unpacked.
#pragma once

#include "core/tensor.h"
#include "linear/packed_weight.h"

namespace specbranch {

struct PackedLinearParams {
  Launch launch;
  Tensor input;  // [..., in], contiguous, bfloat16
  PackedWeight weight;
  Tensor bias;    // [out], contiguous; data is null without a bias
  Tensor output;  // [..., out], contiguous, written
};

void check_packed_linear(const PackedLinearParams& params);
void run_packed_linear(const PackedLinearParams& params);

}  // namespace specbranch

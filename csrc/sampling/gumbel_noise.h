// gumbel_noise: the noise vector that verify and draft_sample add to the scaled logits, for inspection and tests.
#pragma once

#include "core/tensor.h"

namespace specbranch {

struct GumbelNoiseParams {
  Launch launch;
  Tensor positions;  // int64 [n]
  Tensor seed;       // int64 []
  Tensor noise;      // float32 [n, V], written
};

void check_gumbel_noise(const GumbelNoiseParams& params);
void run_gumbel_noise(const GumbelNoiseParams& params);

}  // namespace specbranch

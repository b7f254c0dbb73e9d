// Rounding a weight to blocks of 8 or 4 bits, once a load.
#pragma once

#include "linear/packed_weight.h"

namespace specbranch {

struct QuantizeWeightParams {
  Launch launch;
  Tensor weight;        // bfloat16 [out, in], last dimension contiguous, `in` a multiple of 32
  WeightFormat format;  // q8_0 or q4_0
  Tensor blocks;        // uint8 [out, bytes of a row], contiguous, written
  int64_t* odd_row;     // written: a row with numbers that no scale can hold, or -1
};

void check_quantize_weight(const QuantizeWeightParams& params);

// Throws std::invalid_argument for a weight that is not finite, or too large for a scale in float16.
void run_quantize_weight(const QuantizeWeightParams& params);

}  // namespace specbranch

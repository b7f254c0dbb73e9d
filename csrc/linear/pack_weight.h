// Packing a weight, once a load.
#pragma once

#include "linear/packed_weight.h"

namespace specbranch {

// Bytes that the weight takes in this format. weight: bfloat16 [out, in], last dimension contiguous.
int64_t packed_bytes(const Tensor& weight, WeightFormat format, int threads);

struct PackWeightParams {
  Launch launch;
  Tensor weight;        // bfloat16 [out, in], last dimension contiguous
  PackedWeight packed;  // of packed_bytes bytes, written
};

void check_pack_weight(const PackWeightParams& params);
void run_pack_weight(const PackWeightParams& params);

}  // namespace specbranch

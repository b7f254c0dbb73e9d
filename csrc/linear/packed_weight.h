// A weight in fewer bytes, and the formats that there are.
#pragma once

#include <string>

#include "core/tensor.h"

namespace specbranch {

enum class WeightFormat { lossless };  // linear/lossless.h

// Throws std::invalid_argument for a name that is none.
WeightFormat weight_format(const std::string& name);

struct PackedWeight {
  WeightFormat format = WeightFormat::lossless;
  int64_t out = 0, in = 0;
  Tensor data;  // uint8 [bytes], contiguous, aligned to 64 bytes
};

void check_packed(const PackedWeight& weight);

}  // namespace specbranch

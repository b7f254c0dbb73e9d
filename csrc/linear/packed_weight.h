// A weight in fewer bytes, and the formats and arithmetics that there are.
#pragma once

#include <string>

#include "core/tensor.h"

namespace specbranch {

// lossless: linear/lossless.h. The others: blocks as GGUF files have them, linear/block_format.h.
enum class WeightFormat { lossless, q8_0, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k };

// What a product over packed weights computes. exact: bit for bit what `linear` gives for the weight unpacked to
// bfloat16. fast: inputs are rounded to 8 bits, and integers are multiplied (linear/cpu/fast.h).
enum class Arithmetic { exact, fast };

// Both throw std::invalid_argument for a name that is none.
WeightFormat weight_format(const std::string& name);
Arithmetic arithmetic(const std::string& name);

struct PackedWeight {
  WeightFormat format = WeightFormat::lossless;
  Arithmetic arithmetic = Arithmetic::exact;
  int64_t out = 0, in = 0;
  Tensor data;  // uint8 [bytes], contiguous, aligned to 64 bytes
};

void check_packed(const PackedWeight& weight);

}  // namespace specbranch

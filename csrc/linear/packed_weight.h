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

// Bytes of [out, in] once packed, less the raw runs of lossless ones, which lie behind. A whole number of groups of
// outputs takes as many bytes as it takes among others: see PackedWeight.split of the Python module.
int64_t packed_rows_bytes(int64_t out, int64_t in, WeightFormat format, Arithmetic arithmetic);

// A whole number of outputs that no layout keeps together with others.
int64_t packed_group(WeightFormat format);

}  // namespace specbranch

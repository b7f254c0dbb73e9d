// linear: y = x W^T + b, where every element of y is computed by the same operations in the same order, whatever
// the number of rows, the row's place among them and the number of threads. Drafted tokens verified together
// therefore get bit for bit the values that they would get one by one.
#pragma once

#include "core/tensor.h"

namespace specbranch {

struct LinearParams {
  Launch launch;
  Tensor input;   // [..., in], contiguous; float32, bfloat16 or float16, as the other tensors
  Tensor weight;  // [out, in], last dimension contiguous
  Tensor bias;    // [out], contiguous; data is null without a bias
  Tensor output;  // [..., out], contiguous, written
};

// What a product's tensors must be, whatever its weights are.
void check_product(const Tensor& input, int64_t in, int64_t out, const Tensor& bias, const Tensor& output);

// Throws std::invalid_argument naming the tensor and what was expected.
void check_linear(const LinearParams& params);

// The parameters must have passed the check.
void run_linear(const LinearParams& params);

}  // namespace specbranch

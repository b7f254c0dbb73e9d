// gated_activation: act(gate) * up, between the two products of a feed-forward layer.
#pragma once

#include <string>

#include "core/tensor.h"
#include "layers/activation.h"

namespace specbranch {

struct GatedActivationParams {
  Launch launch;
  Tensor gate;         // [..., I], or [..., 2 I] with up's columns behind; float32, bfloat16 or float16, as the others
  bool joined = true;  // there is no tensor up
  Tensor up;           // [..., I]
  Activation activation = Activation::silu;
  Tensor output;  // [..., I], contiguous, written
};
// The rows of gate and up have one stride each (layers/rows.h).

// Throws std::invalid_argument for a name that is none.
Activation activation_named(const std::string& name);

// Throws std::invalid_argument naming the tensor and what was expected.
void check_gated_activation(const GatedActivationParams& params);

// The parameters must have passed the check.
void run_gated_activation(const GatedActivationParams& params);

}  // namespace specbranch

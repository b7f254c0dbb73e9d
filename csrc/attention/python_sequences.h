// The arguments of tree_attention that name the texts of a call, as they come from Python.
#pragma once

#include "core/python_launch.h"

namespace specbranch {

// Whether there are any.
inline bool take_sequences(Object starts, Object sequence, Tensor* starts_tensor, Tensor* sequence_tensor) {
  const bool ragged = !starts.is_none();
  if (ragged == sequence.is_none()) {
    fail(std::string(ragged ? "sequence" : "starts") + ": expected a tensor, as " + (ragged ? "starts" : "sequence") +
         " is one, got None");
  }
  if (ragged) {
    *starts_tensor = tensor(starts, "starts");
    *sequence_tensor = tensor(sequence, "sequence");
  }
  return ragged;
}

}  // namespace specbranch

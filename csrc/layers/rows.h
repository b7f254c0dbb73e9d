// The leading dimensions of a tensor as one.
#pragma once

#include "core/isa.h"
#include "core/tensor.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

// Rows of `size` elements that lie next to each other; from one row to the next it is `stride` elements.
struct Rows {
  int64_t count = 1, size = 0, stride = 0;
};

// Of a tensor with at least one dimension, whose rows must have a common stride.
inline Rows rows_of(const Tensor& t) {
  Rows rows;
  rows.size = t.shape[t.dims - 1];
  for (int i = t.dims - 2; i >= 0; --i) {
    if (rows.count == 1) rows.stride = t.stride[i];
    rows.count *= t.shape[i];
  }
  return rows;
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

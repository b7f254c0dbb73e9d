// linear's checks and the choice of its kernel.
#include "linear/linear.h"

#include "core/dispatch.h"

namespace specbranch {

void check_linear(const LinearParams& p) {
  const Tensor &x = p.input, &w = p.weight, &y = p.output;
  check_float(x);
  check_dtype(w, x.dtype);
  check_shape(w, {-1, -1}, "[out, in]");
  check_last_dim_contiguous(w);
  if (x.dims < 1 || x.shape[x.dims - 1] != w.shape[1]) {
    fail("input: expected shape [..., in] with in = " + std::to_string(w.shape[1]) + " (weight has shape " +
         shape_text(w) + "), got " + shape_text(x));
  }
  check_contiguous(x);
  if (p.bias.data != nullptr) {
    check_dtype(p.bias, x.dtype);
    check_shape(p.bias, {w.shape[0]}, "[out]");
    check_contiguous(p.bias);
  }
  check_dtype(y, x.dtype);
  check_contiguous(y);
  bool same = y.dims == x.dims && y.shape[y.dims - 1] == w.shape[0];
  for (int i = 0; same && i + 1 < x.dims; ++i) same = y.shape[i] == x.shape[i];
  if (!same) {
    fail("output: expected the input's shape with out = " + std::to_string(w.shape[0]) + ", got " + shape_text(y));
  }
}

SPECBRANCH_DISPATCH_CPU_ONLY(linear, LinearParams)

}  // namespace specbranch

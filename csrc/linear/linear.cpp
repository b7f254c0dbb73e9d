// linear's checks and the choice of its kernel.
#include "linear/linear.h"

#include "core/dispatch.h"

namespace specbranch {

void check_linear(const LinearParams& p) {
  check_float(p.input);
  check_dtype(p.weight, p.input.dtype);
  check_shape(p.weight, {-1, -1}, "[out, in]");
  check_last_dim_contiguous(p.weight);
  check_product(p.input, p.weight.shape[1], p.weight.shape[0], p.bias, p.output);
}

void check_product(const Tensor& input, int64_t in, int64_t out, const Tensor& bias, const Tensor& output) {
  const Tensor &x = input, &y = output;
  if (x.dims < 1 || x.shape[x.dims - 1] != in) {
    fail("input: expected shape [..., in] with in = " + std::to_string(in) + " (the weight is [" + std::to_string(out) +
         ", " + std::to_string(in) + "]), got " + shape_text(x));
  }
  check_contiguous(x);
  if (bias.data != nullptr) {
    check_dtype(bias, x.dtype);
    check_shape(bias, {out}, "[out]");
    check_contiguous(bias);
  }
  check_dtype(y, x.dtype);
  check_contiguous(y);
  bool same = y.dims == x.dims && y.shape[y.dims - 1] == out;
  for (int i = 0; same && i + 1 < x.dims; ++i) same = y.shape[i] == x.shape[i];
  if (!same) fail("output: expected the input's shape with out = " + std::to_string(out) + ", got " + shape_text(y));
}

SPECBRANCH_DISPATCH_CPU_BF16(linear, LinearParams)

}  // namespace specbranch

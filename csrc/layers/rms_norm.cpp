// rms_norm's checks and the choice of its kernel.
#include "layers/rms_norm.h"

#include <cfloat>

#include "core/dispatch.h"

namespace specbranch {
namespace {

void check_like_input(const Tensor& t, const Tensor& input) {
  check_dtype(t, input.dtype);
  bool same = t.dims == input.dims;
  for (int i = 0; same && i < t.dims; ++i) same = t.shape[i] == input.shape[i];
  if (!same) fail(std::string(t.name) + ": expected the input's shape " + shape_text(input) + ", got " + shape_text(t));
  check_contiguous(t);
}

}  // namespace

void check_rms_norm(const RmsNormParams& p) {
  check_float(p.input);
  if (p.input.dims < 1) fail("input: expected shape [..., H], got []");
  check_contiguous(p.input);
  check_dtype(p.weight, p.input.dtype);
  check_shape(p.weight, {p.input.shape[p.input.dims - 1]}, "[H]");
  check_contiguous(p.weight);
  if (!(p.eps >= 0.0 && p.eps <= FLT_MAX)) {
    fail("eps: expected a finite float32 of at least 0, got " + number_text(p.eps));
  }
  check_like_input(p.output, p.input);
  if (p.has_residual) {
    check_like_input(p.residual, p.input);
    check_like_input(p.sum, p.input);
  }
}

SPECBRANCH_DISPATCH(rms_norm, RmsNormParams)

}  // namespace specbranch

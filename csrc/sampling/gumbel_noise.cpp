// gumbel_noise's checks and the choice of its kernel.
#include "sampling/gumbel_noise.h"

#include "core/dispatch.h"

namespace specbranch {

void check_gumbel_noise(const GumbelNoiseParams& p) {
  check_dtype(p.positions, Dtype::int64);
  check_shape(p.positions, {-1}, "[n]");
  check_contiguous(p.positions);
  check_dtype(p.seed, Dtype::int64);
  if (p.seed.dims != 0) fail("seed: expected shape [], got " + shape_text(p.seed));
  check_shape(p.noise, {p.positions.shape[0], -1}, "[n, V]");
  check_dtype(p.noise, Dtype::float32);
  check_contiguous(p.noise);
}

SPECBRANCH_DISPATCH(gumbel_noise, GumbelNoiseParams)

}  // namespace specbranch

// packed_linear's checks and the choice of its kernel.
#include "linear/packed_linear.h"

#include "core/dispatch.h"
#include "linear/linear.h"

namespace specbranch {

void check_packed_linear(const PackedLinearParams& p) {
  check_dtype(p.input, Dtype::bfloat16);
  check_packed(p.weight);
  check_product(p.input, p.weight.in, p.weight.out, p.bias, p.output);
}

SPECBRANCH_DISPATCH_CPU_BF16(packed_linear, PackedLinearParams)

}  // namespace specbranch

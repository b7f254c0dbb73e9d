// linear and packed_linear of bfloat16 with the processor's tiles.
#include "linear/cpu/amx/few.h"
#include "linear/cpu/amx/many.h"
#include "linear/cpu/bf16/run.h"
#include "linear/cpu/fast.h"
#include "linear/cpu/unpacked.h"

namespace specbranch {
namespace cpu {
namespace SPECBRANCH_ISA {

void linear(const LinearParams& params) { run_dense(params); }

void packed_linear(const PackedLinearParams& params) {
  if (params.weight.arithmetic == Arithmetic::fast) return fast(params);
  if (params.weight.format == WeightFormat::lossless) return run_lossless(params);
  const int64_t out = params.weight.out, in = params.weight.in;
  for_unpacked(params, [&](const Bfloat16* weights, int64_t stride, int64_t begin, int64_t count) {
    Product<Dense> p = product_of(Dense{weights, stride, count, in}, params, in, out);
    p.output += begin;
    if (p.bias != nullptr) p.bias += begin;
    p.out = count;
    run(p, 1);
  });
}

}  // namespace SPECBRANCH_ISA
}  // namespace cpu
}  // namespace specbranch

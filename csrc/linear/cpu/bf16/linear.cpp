// linear and packed_linear of bfloat16 with the processor's own instructions for it.
#include "linear/cpu/bf16/blocks.h"
#include "linear/cpu/bf16/few.h"
#include "linear/cpu/bf16/many.h"
#include "linear/cpu/bf16/run.h"
#include "linear/cpu/fast.h"

namespace specbranch {
namespace cpu {
namespace SPECBRANCH_ISA {

void linear(const LinearParams& params) { run_dense(params); }

void packed_linear(const PackedLinearParams& params) {
  if (params.weight.arithmetic == Arithmetic::fast) return fast(params);
#if defined(__AVX512BF16__)
  if (params.weight.format != WeightFormat::lossless) return run_blocks(params);
  run_lossless(params);
#else
  run_unpacked(params);
#endif
}

}  // namespace SPECBRANCH_ISA
}  // namespace cpu
}  // namespace specbranch

// linear and packed_linear of bfloat16 with the processor's tiles.
#include "linear/cpu/amx/few.h"
#include "linear/cpu/amx/many.h"
#include "linear/cpu/bf16/run.h"

namespace specbranch {
namespace cpu {
namespace SPECBRANCH_ISA {

void linear(const LinearParams& params) { run_dense(params); }

void packed_linear(const PackedLinearParams& params) { run_lossless(params); }

}  // namespace SPECBRANCH_ISA
}  // namespace cpu
}  // namespace specbranch

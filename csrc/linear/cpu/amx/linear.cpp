// linear and packed_linear of bfloat16 with the processor's tiles.
#include "linear/cpu/amx/fast.h"
#include "linear/cpu/amx/few.h"
#include "linear/cpu/amx/many.h"
#include "linear/cpu/bf16/run.h"

namespace specbranch {
namespace cpu {
namespace SPECBRANCH_ISA {

namespace {

void run_blocks(const PackedLinearParams& params) {
  const int64_t out = params.weight.out, in = params.weight.in;
  with_block_format(params.weight.format, [&](auto format) {
    const BlockWeights<format> weights{params.weight.data.as<const uint8_t>(), {out, in}};
    run(product_of(weights, params, in, out), params.launch.threads);
  });
}

}  // namespace

void linear(const LinearParams& params) { run_dense(params); }

void packed_linear(const PackedLinearParams& params) {
  if (params.weight.arithmetic == Arithmetic::fast) {
    return rows_of(params.input) > fast_rows ? fast_in_tiles(params) : fast(params);
  }
  if (params.weight.format == WeightFormat::lossless) return run_lossless(params);
  run_blocks(params);
}

}  // namespace SPECBRANCH_ISA
}  // namespace cpu
}  // namespace specbranch

// quantize_weight's checks and the choice of its kernel.
#include "linear/quantize_weight.h"

#include "core/dispatch.h"
#include "linear/packed_blocks.h"

namespace specbranch {

void check_quantize_weight(const QuantizeWeightParams& p) {
  if (p.format != WeightFormat::q8_0 && p.format != WeightFormat::q4_0) fail("format: expected q8_0 or q4_0");
  check_dtype(p.weight, Dtype::bfloat16);
  check_shape(p.weight, {-1, -1}, "[out, in]");
  check_last_dim_contiguous(p.weight);
  if (p.weight.device != cpu_device) fail("weight: expected a tensor on the CPU");
  if (p.weight.shape[1] % run_size != 0) {
    fail("weight: expected rows of a multiple of 32 weights, got " + std::to_string(p.weight.shape[1]));
  }
  check_dtype(p.blocks, Dtype::uint8);
  check_shape(p.blocks, {p.weight.shape[0], p.weight.shape[1] / run_size * block_format(p.format).bytes},
              "[out, bytes of a row]");
  check_contiguous(p.blocks);
}

#ifndef SPECBRANCH_EMULATED  // which has CUDA's kernels only
SPECBRANCH_CPU_KERNEL(quantize_weight, QuantizeWeightParams)

void run_quantize_weight(const QuantizeWeightParams& params) {
  cpu::quantize_weight(params);
  if (*params.odd_row >= 0) {
    fail("weight: expected finite numbers that a scale of float16 can hold, row " + std::to_string(*params.odd_row) +
         " has others");
  }
}
#endif

}  // namespace specbranch

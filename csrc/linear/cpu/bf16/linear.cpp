// linear and packed_linear of bfloat16 with the processor's own instructions for it.
#include "linear/linear.h"

#include "linear/cpu/bf16/dense.h"
#include "linear/cpu/bf16/few.h"
#include "linear/cpu/bf16/lossless.h"
#include "linear/cpu/bf16/many.h"
#include "linear/cpu/parallel.h"
#include "linear/cpu/unpacked.h"
#include "linear/packed_linear.h"

namespace specbranch {
namespace cpu {
namespace SPECBRANCH_ISA {
namespace {

template <typename Weights>
void run(const Product<Weights>& whole, int threads) {
  const int64_t passes = whole.out == 0 ? 0 : divide_up(whole.rows, most_many);
  for (int64_t i = 0; i < passes; ++i) {
    Product<Weights> p = whole;
    const int64_t row = group_begin(whole.rows, passes, i);
    p.rows = group_begin(whole.rows, passes, i + 1) - row;
    p.input += row * p.in;
    p.output += row * p.stride;
    const int some = threads_for(p.rows, p.in, p.out, threads);
    if (p.rows <= most_few) {
      few(p, some);
    } else {
      many(p, some);
    }
  }
}

template <typename Weights, typename Params>
Product<Weights> product(const Weights& weights, const Params& params, int64_t in, int64_t out) {
  return {weights,
          params.input.template as<const Bfloat16>(),
          params.bias.template as<const Bfloat16>(),
          params.output.template as<Bfloat16>(),
          rows_of(params.input),
          in,
          out,
          out};
}

}  // namespace

void linear(const LinearParams& params) {
  const Tensor& w = params.weight;
  const int64_t out = w.shape[0], in = w.shape[1];
  run(product(Dense{w.as<const Bfloat16>(), w.stride[0], out, in}, params, in, out), params.launch.threads);
}

void packed_linear(const PackedLinearParams& params) {
  const int64_t out = params.weight.out, in = params.weight.in;
#if defined(__AVX512BF16__)
  const LosslessWeights weights{params.weight.data.as<const uint8_t>(), {out, in}};
  run(product(weights, params, in, out), params.launch.threads);
#else
  for_unpacked(params, [&](const Bfloat16* weights, int64_t stride, int64_t begin, int64_t count) {
    Product<Dense> p = product(Dense{weights, stride, count, in}, params, in, out);
    p.output += begin;
    if (p.bias != nullptr) p.bias += begin;
    p.out = count;
    run(p, 1);
  });
#endif
}

}  // namespace SPECBRANCH_ISA
}  // namespace cpu
}  // namespace specbranch

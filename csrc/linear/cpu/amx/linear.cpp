// linear and packed_linear of bfloat16 with the processor's tiles.
#include "linear/linear.h"

#include "linear/cpu/amx/few.h"
#include "linear/cpu/amx/many.h"
#include "linear/packed_linear.h"

namespace specbranch {
namespace cpu {
namespace SPECBRANCH_ISA {
namespace {

template <typename Weights>
void run(const Product<Weights>& whole, int threads) {
  for_passes(whole, most_many, [&](const Product<Weights>& p) {
    const int some = threads_for(p.rows, p.in, p.out, threads);
    if (p.rows <= most_few) {
      few(p, some);
    } else {
      many(p, some);
    }
  });
}

}  // namespace

void linear(const LinearParams& params) {
  const Tensor& w = params.weight;
  const int64_t out = w.shape[0], in = w.shape[1];
  run(product_of(Dense{w.as<const Bfloat16>(), w.stride[0], out, in}, params, in, out), params.launch.threads);
}

void packed_linear(const PackedLinearParams& params) {
  const int64_t out = params.weight.out, in = params.weight.in;
  const LosslessWeights weights{params.weight.data.as<const uint8_t>(), {out, in}};
  run(product_of(weights, params, in, out), params.launch.threads);
}

}  // namespace SPECBRANCH_ISA
}  // namespace cpu
}  // namespace specbranch

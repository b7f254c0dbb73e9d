// From an op's arguments to kernels for few rows and for many. Include it behind those: few, most_few, many, most_many.
#pragma once

#include "linear/cpu/bf16/dense.h"
#include "linear/cpu/bf16/lossless.h"
#include "linear/cpu/bf16/product.h"
#include "linear/cpu/unpacked.h"
#include "linear/linear.h"
#include "linear/packed_linear.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

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

inline void run_dense(const LinearParams& params) {
  const Tensor& w = params.weight;
  const int64_t out = w.shape[0], in = w.shape[1];
  run(product_of(Dense{w.as<const Bfloat16>(), w.stride[0], out, in}, params, in, out), params.launch.threads);
}

#if defined(__AVX512BF16__)
inline void run_lossless(const PackedLinearParams& params) {
  const int64_t out = params.weight.out, in = params.weight.in;
  const LosslessWeights weights{params.weight.data.as<const uint8_t>(), {out, in}};
  run(product_of(weights, params, in, out), params.launch.threads);
}
#else
// Where no kernel reads the weights packed.
inline void run_unpacked(const PackedLinearParams& params) {
  const int64_t out = params.weight.out, in = params.weight.in;
  for_unpacked(params, [&](const Bfloat16* weights, int64_t stride, int64_t begin, int64_t count) {
    Product<Dense> p = product_of(Dense{weights, stride, count, in}, params, in, out);
    p.output += begin;
    if (p.bias != nullptr) p.bias += begin;
    p.out = count;
    run(p, 1);
  });
}
#endif

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

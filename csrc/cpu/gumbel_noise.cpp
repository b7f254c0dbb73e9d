#include "gumbel_noise.h"

#include "numerics.h"

namespace specbranch {
namespace cpu {
namespace SPECBRANCH_ISA {

void gumbel_noise(const GumbelNoiseParams& p) {
  check_dtype(p.positions, Dtype::int64);
  check_shape(p.positions, {-1}, "[n]");
  check_contiguous(p.positions);
  check_dtype(p.seed, Dtype::int64);
  check_shape(p.noise, {p.positions.shape[0], -1}, "[n, V]");
  check_dtype(p.noise, Dtype::float32);
  check_contiguous(p.noise);

  const int64_t rows = p.noise.shape[0], vocabulary = p.noise.shape[1];
  const int64_t* positions = p.positions.as<const int64_t>();
  const uint64_t seed = static_cast<uint64_t>(*p.seed.as<const int64_t>());
  float* noise = p.noise.as<float>();

#pragma omp parallel for schedule(static) num_threads(p.launch.threads)
  for (int64_t i = 0; i < rows * vocabulary; ++i) {
    const NoiseKey key{seed, static_cast<uint64_t>(positions[i / vocabulary])};
    noise[i] = token_noise(key, i % vocabulary);
  }
}

}  // namespace SPECBRANCH_ISA
}  // namespace cpu
}  // namespace specbranch

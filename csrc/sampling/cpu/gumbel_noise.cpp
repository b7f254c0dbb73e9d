#include "sampling/gumbel_noise.h"

#include "core/cpu/philox_simd.h"

namespace specbranch::cpu::SPECBRANCH_ISA {

void gumbel_noise(const GumbelNoiseParams& p) {
  const int64_t rows = p.noise.shape[0], vocabulary = p.noise.shape[1];
  const uint64_t seed = static_cast<uint64_t>(*p.seed.as<const int64_t>());
  const int threads = rows * vocabulary < 16384 ? 1 : p.launch.threads;

#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) {
    const NoiseKey key{seed, static_cast<uint64_t>(p.positions.as<const int64_t>()[i])};
    const NoiseWords noise(key);
    float* row = p.noise.as<float>() + i * vocabulary;
    int64_t t = 0;
    for (; t + NoiseWords::group <= vocabulary; t += NoiseWords::group) {
      UintVec words[2];
      noise.get(t, words);
      for (int half = 0; half < 2; ++half) {
        float* out = row + t + half * simd_width;
        store_unaligned(out, gumbel<FloatVec>((IntVec)words[half], IntVec{}));
        // One word in 65536 has a tail.
        for (uint32_t bits = mask_bits((IntVec)(words[half] < 65536u)); bits != 0; bits &= bits - 1) {
          const int lane = __builtin_ctz(bits);
          out[lane] = token_noise(key, t + half * simd_width + lane);
        }
      }
    }
    for (; t < vocabulary; ++t) row[t] = token_noise(key, t);
  }
}

}  // namespace specbranch::cpu::SPECBRANCH_ISA

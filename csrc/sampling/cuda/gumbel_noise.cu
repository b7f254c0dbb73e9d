// One thread for the four tokens of a Philox block at a time. Lower bound: the noise's bytes once, and two logarithms a
// token.
#include "sampling/gumbel_noise.h"

#include "sampling/cuda/fixed_point.h"

namespace specbranch::cuda {
namespace {

constexpr int threads = 256;

__global__ void __launch_bounds__(threads)
    gumbel_noise_kernel(const int64_t* positions, const int64_t* seed, int64_t rows, int64_t vocabulary, float* noise) {
  const int64_t groups = divide_up(vocabulary, group_tokens), all = rows * groups;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; at < all;
       at += static_cast<int64_t>(gridDim.x) * threads) {
    const int64_t row = at / groups, group = at - row * groups;
    const NoiseKey key{static_cast<uint64_t>(*seed), static_cast<uint64_t>(positions[row])};
    const PhiloxWords words = key.block(static_cast<uint32_t>(group), Purpose::gumbel);
    const int64_t left = vocabulary - group * group_tokens;
    float* out = noise + row * vocabulary + group * group_tokens;
#pragma unroll
    for (int j = 0; j < group_tokens; ++j) {
      if (j >= left) break;
      const uint32_t word = words.word[j];
      uint32_t tail = 0;
      if (word < 65536u) tail = key.block(static_cast<uint32_t>(group), Purpose::gumbel_tail).word[j];
      out[j] = gumbel<float>(static_cast<int32_t>(word), static_cast<int32_t>(tail));
    }
  }
}

}  // namespace

void gumbel_noise(const GumbelNoiseParams& p) {
  const int64_t rows = p.noise.shape[0], vocabulary = p.noise.shape[1];
  const int64_t blocks = divide_up(rows * divide_up(vocabulary, group_tokens), threads);
  if (blocks == 0) return;
  const int64_t most_blocks = 132 * 8;  // what an H100 runs at once
  launch("gumbel_noise", gumbel_noise_kernel, p.launch,
         dim3(static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks)), dim3(threads), 0,
         p.positions.as<const int64_t>(), p.seed.as<const int64_t>(), rows, vocabulary, p.noise.as<float>());
}

}  // namespace specbranch::cuda

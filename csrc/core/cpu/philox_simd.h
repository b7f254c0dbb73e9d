// Philox for consecutive tokens of one position, several counters at a time.
#pragma once

#include "core/cpu/simd.h"
#include "core/philox.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

// The noise words of tokens t, t + 1, ... for one NoiseKey.
//
// Each 64-bit lane carries one counter; only the low half of a lane means anything, because that is all the
// multiplication reads. What depends on the position alone (the first two rounds mostly) is computed once.
class NoiseWords {
 public:
  static constexpr int64_t group = 2 * simd_width;  // tokens per call

  explicit NoiseWords(const NoiseKey& key) {
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
    for (int round = 0; round < philox_rounds; ++round) {
      key_0_[round] = broadcast(static_cast<uint64_t>(k0));
      key_1_[round] = broadcast(static_cast<uint64_t>(k1));
      k0 += philox_weyl_0;
      k1 += philox_weyl_1;
    }
    const uint64_t position_low = static_cast<uint32_t>(key.position), position_high = key.position >> 32;
    const uint64_t product_1 = philox_multiplier_1 * position_high;
    const uint64_t first_0 = (product_1 >> 32) ^ position_low ^ key_0_[0][0];
    const uint64_t product_0 = philox_multiplier_0 * first_0;
    first_2_ = broadcast(static_cast<uint64_t>(Purpose::gumbel)) ^ key_1_[0];
    second_0_ = broadcast(product_1 & 0xFFFFFFFFu) ^ key_0_[1];
    second_2_ = broadcast(product_0 >> 32) ^ key_1_[1];
    second_3_ = broadcast(product_0);
    // The order of counters that makes the final shuffles write tokens in order.
    for (int lane = 0; lane < lanes; ++lane) lane_block_[lane] = (lane & 1) * (lanes / 2) + lane / 2;
  }

  // words[0] and words[1]: tokens first .. first + group - 1; first is a multiple of 4.
  void get(int64_t first, UintVec words[2]) const {
    const WideVec m0 = broadcast(static_cast<uint64_t>(philox_multiplier_0));
    const WideVec m1 = broadcast(static_cast<uint64_t>(philox_multiplier_1));
    const WideVec first_3 = multiply_low_halves(m0, lane_block_ + broadcast(static_cast<uint64_t>(first >> 2)));
    const WideVec product = multiply_low_halves(m1, (first_3 >> 32) ^ first_2_);
    WideVec c0 = (product >> 32) ^ second_0_, c1 = product, c2 = first_3 ^ second_2_, c3 = second_3_;
#pragma GCC unroll 8
    for (int round = 2; round < philox_rounds; ++round) {
      const WideVec product_0 = multiply_low_halves(m0, c0), product_1 = multiply_low_halves(m1, c2);
      c0 = (product_1 >> 32) ^ c1 ^ key_0_[round];
      c2 = (product_0 >> 32) ^ c3 ^ key_1_[round];
      c1 = product_1;
      c3 = product_0;
    }
    const UintVec low = even_lanes((UintVec)c0, (UintVec)c1), high = even_lanes((UintVec)c2, (UintVec)c3);
    words[0] = even_lanes(low, high);
    words[1] = odd_lanes(low, high);
  }

 private:
  static constexpr int lanes = simd_width / 2;

  // In each 128 bits: two lanes of a, then two of b.
#if defined(__AVX512F__)
#define SPECBRANCH_SHUFFLE(i, j) \
  i, j, i + 16, j + 16, i + 4, j + 4, i + 20, j + 20, i + 8, j + 8, i + 24, j + 24, i + 12, j + 12, i + 28, j + 28
#elif defined(__AVX2__)
#define SPECBRANCH_SHUFFLE(i, j) i, j, i + 8, j + 8, i + 4, j + 4, i + 12, j + 12
#else
#define SPECBRANCH_SHUFFLE(i, j) i, j, i + 4, j + 4
#endif
  static UintVec even_lanes(UintVec a, UintVec b) { return __builtin_shufflevector(a, b, SPECBRANCH_SHUFFLE(0, 2)); }
  static UintVec odd_lanes(UintVec a, UintVec b) { return __builtin_shufflevector(a, b, SPECBRANCH_SHUFFLE(1, 3)); }
#undef SPECBRANCH_SHUFFLE

  WideVec key_0_[philox_rounds], key_1_[philox_rounds];
  WideVec first_2_, second_0_, second_2_, second_3_, lane_block_;
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

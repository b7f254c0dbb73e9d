// Philox4x32-10: random words from a key and a counter, without any state.
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

// What a random word is drawn for; the last word of the counter.
enum class Purpose : uint32_t { gumbel = 0, gumbel_tail = 1, accept = 2, residual = 3 };

struct PhiloxWords {
  uint32_t word[4];
};

constexpr uint32_t philox_multiplier_0 = 0xD2511F53u, philox_multiplier_1 = 0xCD9E8D57u;
constexpr uint32_t philox_weyl_0 = 0x9E3779B9u, philox_weyl_1 = 0xBB67AE85u;
constexpr int philox_rounds = 10;

SPECBRANCH_HD inline PhiloxWords philox(PhiloxWords counter, uint32_t key_0, uint32_t key_1) {
  uint32_t* c = counter.word;
  for (int round = 0; round < philox_rounds; ++round) {
    const uint64_t product_0 = static_cast<uint64_t>(philox_multiplier_0) * c[0];
    const uint64_t product_1 = static_cast<uint64_t>(philox_multiplier_1) * c[2];
    const uint32_t next_0 = static_cast<uint32_t>(product_1 >> 32) ^ c[1] ^ key_0;
    const uint32_t next_2 = static_cast<uint32_t>(product_0 >> 32) ^ c[3] ^ key_1;
    c[1] = static_cast<uint32_t>(product_1);
    c[3] = static_cast<uint32_t>(product_0);
    c[0] = next_0;
    c[2] = next_2;
    key_0 += philox_weyl_0;
    key_1 += philox_weyl_1;
  }
  return counter;
}

// One position's noise: which words belong to token t, for any vocabulary size.
struct NoiseKey {
  uint64_t seed;
  uint64_t position;

  SPECBRANCH_HD PhiloxWords block(uint32_t index, Purpose purpose) const {
    return philox({{index, static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
                    static_cast<uint32_t>(purpose)}},
                  static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  }
  SPECBRANCH_HD uint32_t word(int64_t token, Purpose purpose) const {
    return block(static_cast<uint32_t>(token >> 2), purpose).word[token & 3];
  }
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

// In which order blocks and threads run, and on how many OS threads.
#pragma once

#include <cstdint>
#include <string>

namespace specbranch::emulator {

enum class Order { forward, reverse, shuffle };

struct Schedule {
  Order order = Order::shuffle;
  uint64_t seed = 0;
};

// The text is one that set_schedule takes; throws std::invalid_argument for another.
Schedule parse_schedule(const std::string& text);

// Added to a seed, so that kernels differ.
uint64_t hash_text(const char* text);

// OS threads of a large grid.
int thread_count();

class Random {
 public:
  Random() = default;
  explicit Random(uint64_t seed) : state_(seed) {
    for (int i = 0; i < 4; ++i) next();
  }
  uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>(static_cast<uint64_t>(next()) * n >> 32); }
  // 1 to 2^(bits - 1), each order of magnitude as often as the others.
  int run_length(int bits) { return 1 << below(bits); }
  // The number of a set bit.
  int pick(uint32_t bits) {
    const uint32_t word = next();
    const int rotation = word >> 27;
    const uint32_t rotated = bits >> rotation | bits << (-rotation & 31);
    const int bit = (word & 0x04000000u) != 0 ? __builtin_ctz(rotated) : 31 - __builtin_clz(rotated);
    return (bit + rotation) & 31;
  }

 private:
  uint64_t state_ = 0;
};

}  // namespace specbranch::emulator

// Products in tiles, and the instructions in software that they run with here.
#include <sys/wait.h>

#include <thread>
#include <utility>

#include "products.h"

namespace specbranch {
namespace {

// The order that the tiles have: pairs' first and second elements apart, and their sum to the output's, every 32
// elements.
TEST(tiles_add_up_in_the_order_of_the_manual) {
  for_levels([](const Level& level) {
    if (level.linear != cpu::amx::linear) return;
    for (const Case& size : cases) {
      Problem p(level, size);
      for (const int64_t rows : {1, 11, 19, 35}) {
        p.linear(0, rows, 1);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t o = 0; o < p.out; ++o) {
            float sum = 0;
            for (int64_t step = 0; step < p.in; step += 32) {
              float parts[2] = {};
              for (int64_t k = step; k < std::min(step + 32, p.in); ++k) {
                parts[k % 2] =
                    std::fma(wide(p.weight.data[o * p.in + k]), wide(p.input.data[r * p.in + k]), parts[k % 2]);
              }
              sum += parts[0] + parts[1];
            }
            CHECK_EQUAL(p.output.data[r * p.out + o].bits, rounded(sum + wide(p.bias.data[o])).bits);
          }
        }
      }
    }
  });
}

// Rows of a tile, and bytes of one.
using Sizes = std::vector<std::pair<int, int>>;

void configure(const Sizes& sizes, int palette = 1) {
  uint8_t config[64] = {};
  config[0] = static_cast<uint8_t>(palette);
  for (size_t i = 0; i < sizes.size(); ++i) {
    config[16 + 2 * i] = static_cast<uint8_t>(sizes[i].second);
    config[48 + i] = static_cast<uint8_t>(sizes[i].first);
  }
  emulated_amx::load_config(config);
}

TEST(emulated_tiles_do_what_the_manual_says) {
  if (!runs_here()) return;
  configure({{2, 12}, {2, 8}, {2, 12}});
  const float large = 0x1p30f, small = 0x1p-100f;
  const auto put = [](int tile, int rows, int pairs, const std::vector<float>& values) {
    std::vector<Bfloat16> data;
    for (const float x : values) data.push_back(rounded(x));
    CHECK(static_cast<int>(data.size()) == rows * pairs * 2);
    if (tile == 1) emulated_amx::load(1, data.data(), pairs * 4);
    if (tile == 2) emulated_amx::load(2, data.data(), pairs * 4);
  };
  put(1, 2, 2, {large, 1, -large, 1, 1, 2, 3, 4});
  put(2, 2, 3, {1, 2, 1, 0, small, small, 1, 3, 2, 0, small, 0x1p-130f});
  float sums[2][3] = {{100, 0, 0}, {0, 0, 0x1p-126f}};
  emulated_amx::load(0, sums, sizeof sums[0]);
  emulated_amx::add_products(0, 1, 2);
  emulated_amx::store(0, sums, sizeof sums[0]);
  // First elements: large - large; second ones: 2 + 3. In one sum of the four they would be lost.
  CHECK_EQUAL(sums[0][0], 105);
  CHECK_EQUAL(sums[0][1], -large);
  CHECK_EQUAL(sums[1][0], 1 + 4 + 3 + 12);
  CHECK_EQUAL(sums[1][1], 1 + 6);
  // small * 1 + small * 3, small * 2 + a subnormal number that counts as 0.
  CHECK_EQUAL(sums[1][2], 0x1p-126f + 6 * small);
  // A subnormal result is 0.
  float tiny[2][3] = {{0x1.8p-126f, 0, 0}, {0, 0, 0}};
  emulated_amx::load(0, tiny, sizeof tiny[0]);
  put(1, 2, 2, {-0x1p-126f, 0, 0, 0, 0, 0, 0, 0});
  put(2, 2, 3, {1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0});
  emulated_amx::add_products(0, 1, 2);
  emulated_amx::store(0, tiny, sizeof tiny[0]);
  CHECK_EQUAL(tiny[0][0], 0);
  emulated_amx::release();
}

TEST(emulated_tiles_multiply_signed_bytes) {
  if (!runs_here()) return;
  configure({{2, 12}, {2, 8}, {2, 12}});
  const int8_t a[2][8] = {{-128, 127, 1, 2, 3, 4, 5, 6}, {0, 0, 0, -1, 1, 0, 0, 0}};
  int8_t b[2][12] = {};
  for (int k = 0; k < 8; ++k) b[k / 4][k % 4] = static_cast<int8_t>(k == 0 ? -128 : k);      // first column
  for (int k = 0; k < 8; ++k) b[k / 4][8 + k % 4] = static_cast<int8_t>(k == 3 ? 100 : -k);  // last one
  int32_t sums[2][3] = {{7, 7, 7}, {INT32_MAX, 0, 0}};
  emulated_amx::load(1, a, sizeof a[0]);
  emulated_amx::load(2, b, sizeof b[0]);
  emulated_amx::load(0, sums, sizeof sums[0]);
  emulated_amx::add_byte_products(0, 1, 2);
  emulated_amx::store(0, sums, sizeof sums[0]);
  CHECK_EQUAL(sums[0][0], 7 + 128 * 128 + 127 + 2 + 6 + 12 + 20 + 30 + 42);
  CHECK_EQUAL(sums[0][1], 7);
  CHECK_EQUAL(sums[0][2], 7 - 127 - 2 + 200 - 12 - 20 - 30 - 42);
  CHECK_EQUAL(sums[1][0], static_cast<int32_t>(static_cast<uint32_t>(INT32_MAX) + 1));
  CHECK_EQUAL(sums[1][2], -104);
  emulated_amx::release();
}

// Whether `run` ends the process.
bool dies(const std::function<void()>& run) {
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    if (freopen("/dev/null", "w", stderr) == nullptr) _exit(0);
    run();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status);
}

TEST(emulated_tiles_find_mistakes) {
  if (!runs_here()) return;
  const Sizes good{{16, 64}, {16, 64}, {16, 64}};
  float memory[256] = {};
  const auto load = [&](int tile) { emulated_amx::load(tile, memory, 64); };
  const auto multiply = [](const Sizes& sizes) {
    return [sizes] {
      configure(sizes);
      emulated_amx::add_products(0, 1, 2);
    };
  };
  CHECK(!dies(multiply(good)));
  CHECK(dies([&] { load(0); }));
  CHECK(dies([&] {
    configure(good);
    load(3);
  }));
  CHECK(dies([&] {
    configure(good);
    load(8);
  }));
  CHECK(dies([&] {
    configure(good);
    emulated_amx::release();
    emulated_amx::zero(0);
  }));
  CHECK(dies([&] {
    configure(good);
    std::thread([&] { load(0); }).join();  // tiles are a thread's own
  }));
  CHECK(dies([&] {
    configure(good);
    emulated_amx::add_products(0, 1, 1);
  }));
  CHECK(dies([&] {
    configure({{8, 64}, {16, 64}, {16, 64}});
    emulated_amx::add_byte_products(0, 1, 2);
  }));
  CHECK(dies([&] { configure(good, 2); }));
  CHECK(dies([&] { configure({{17, 64}}); }));
  CHECK(dies([&] { configure({{16, 68}}); }));
  CHECK(dies([&] { configure({{16, 0}}); }));
  CHECK(dies(multiply({{8, 64}, {16, 64}, {16, 64}})));
  CHECK(dies(multiply({{16, 32}, {16, 64}, {16, 64}})));
  CHECK(dies(multiply({{16, 64}, {16, 32}, {16, 64}})));
  CHECK(dies(multiply({{16, 6}, {16, 64}, {16, 6}})));
}

}  // namespace
}  // namespace specbranch

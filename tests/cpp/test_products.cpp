// The products of bfloat16 by the processor's own instructions: rows that do not notice each other, packed weights with
// the same bits, and no read beyond a tensor's end. Here so that a cross compiler and an emulator can run them too.
#include <malloc.h>

#include <limits>
#include <thread>

#include "linear/lossless.h"
#include "products.h"

namespace specbranch {
namespace {

TEST(values_are_those_of_a_double_sum) {
  for_levels([](const Level& level) {
    for (const Case& size : cases) {
      Problem p(level, size);
      for (const int64_t rows : {3, 21, 50}) {
        p.with_bias = rows != 21;
        p.linear(0, rows, 1);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t o = 0; o < p.out; ++o) {
            double sum = p.with_bias ? wide(p.bias.data[o]) : 0, magnitude = std::fabs(sum);
            for (int64_t k = 0; k < p.in; ++k) {
              const double product =
                  static_cast<double>(wide(p.input.data[r * p.in + k])) * wide(p.weight.data[o * p.in + k]);
              sum += product;
              magnitude += std::fabs(product);
            }
            const double error = std::fabs(wide(p.output.data[r * p.out + o]) - sum);
            CHECK(error <= std::fabs(sum) * 0.004 + magnitude * 1e-4);
          }
        }
      }
    }
  });
}

TEST(rows_do_not_notice_each_other) {
  for_levels([](const Level& level) {
    for (const Case& size : cases) {
      Problem p(level, size);
      p.with_bias = size.in % 2 == 0;
      const std::vector<uint16_t> alone = p.one_by_one();
      for (const int64_t rows : row_counts(level, size)) {
        // The last ones end where nobody may read on.
        const int64_t row = rows % 2 == 0 ? 0 : p.most - rows;
        const auto first = alone.begin() + row * p.out;
        for (const int threads : {1, 3}) {
          p.linear(row, rows, threads);
          CHECK(p.bits(rows) == std::vector<uint16_t>(first, first + rows * p.out));
        }
      }
    }
  });
}

TEST(other_threads_change_nothing) {
  for_levels([](const Level& level) {
    Problem p(level, {1100, 8 * 128 + 24});  // large enough for more than one
    for (const int64_t rows : {1, 9, 30, 45}) {
      p.linear(0, rows, 1);
      const std::vector<uint16_t> expected = p.bits(rows);
      for (const int threads : {2, 3, 5}) {
        p.linear(0, rows, threads);
        CHECK(p.bits(rows) == expected);
      }
    }
  });
}

TEST(rows_of_the_weight_may_lie_apart) {
  for_levels([](const Level& level) {
    for (const Case& size : cases) {
      Problem together(level, size), apart(level, size, 3);
      for (const int64_t rows : {1, 12, 17, 40}) {
        together.linear(0, rows, 1);
        apart.linear(0, rows, 1);
        CHECK(together.bits(rows) == apart.bits(rows));
      }
    }
  });
}

TEST(infinities_stay_in_their_row_and_output) {
  for_levels([](const Level& level) {
    Problem p(level, {70, 37});
    for (const int64_t rows : {5, 20, 50}) {
      p.linear(0, rows, 1);
      const std::vector<uint16_t> before = p.bits(rows);
      const Bfloat16 weight = p.weight.data[33 * p.in + 69], input = p.input.data[3 * p.in + 1];
      p.weight.data[33 * p.in + 69] = rounded(std::numeric_limits<float>::infinity());
      p.input.data[3 * p.in + 1] = Problem::not_a_number;
      p.linear(0, rows, 1);
      const std::vector<uint16_t> after = p.bits(rows);
      for (int64_t i = 0; i < rows * p.out; ++i) {
        const bool touched = i / p.out == 3 || i % p.out == 33;
        CHECK(touched ? !std::isfinite(wide({after[i]})) : after[i] == before[i]);
      }
      p.weight.data[33 * p.in + 69] = weight;
      p.input.data[3 * p.in + 1] = input;
    }
  });
}

#if defined(__GLIBC__)
TEST(what_scratch_memory_held_does_not_matter) {
  for_levels([](const Level& level) {
    for (const Case& size : cases) {
      Problem p(level, size);
      for (const int64_t rows : {1, 12, 21, 50}) {
        p.linear(0, rows, 1);
        const std::vector<uint16_t> expected = p.bits(rows);
        mallopt(M_PERTURB, 0x100);  // new memory is full of NaN
        std::thread([&] { p.linear(0, rows, 1); }).join();
        mallopt(M_PERTURB, 0);
        CHECK(p.bits(rows) == expected);
      }
    }
  });
}
#endif

TEST(packed_weights_have_the_same_bits) {
  for_levels([](const Level& level) {
    for (const Case& size : cases) {
      Problem p(level, size);
      const Lossless layout{p.out, p.in};
      int64_t raw = 0;
      for (int64_t o = 0; o < p.out; ++o) {
        for (int64_t k = 0; k < p.in; k += Lossless::run) {
          raw += Lossless::top_of(p.weight.data + o * p.in + k, std::min<int64_t>(Lossless::run, p.in - k)) ==
                 Lossless::raw_top;
        }
      }
      const int64_t bytes = layout.raw_offset() + raw * Lossless::raw_bytes;
      Guarded<uint8_t> data(static_cast<size_t>(bytes), 64);
      memset(data.data, 0, static_cast<size_t>(bytes));
      int64_t next = 0;
      for (int64_t o = 0; o < p.out; ++o) {
        for (int64_t k = 0; k < p.in; k += Lossless::run) {
          const Bfloat16* const weights = p.weight.data + o * p.in + k;
          const int64_t count = std::min<int64_t>(Lossless::run, p.in - k);
          next += layout.encode(data.data, o, k / Lossless::run, weights, count, next);
          Bfloat16 back[Lossless::run];
          layout.decode(data.data, o, k / Lossless::run, back);
          CHECK(memcmp(back, weights, static_cast<size_t>(count) * sizeof(Bfloat16)) == 0);
        }
      }
      CHECK(next == raw);
      for (const int64_t rows : row_counts(level, size)) {
        p.with_bias = rows % 3 != 0;
        p.linear(0, rows, 2);
        const std::vector<uint16_t> expected = p.bits(rows);
        PackedLinearParams q;
        q.weight.out = p.out;
        q.weight.in = p.in;
        q.weight.data = tensor(data.data, Dtype::uint8, 1, bytes);
        p.product(level.packed_linear, q, 0, rows, 2);
        CHECK(p.bits(rows) == expected);
      }
    }
  });
}

}  // namespace
}  // namespace specbranch

int main(int argc, char** argv) {
#if defined(SPECBRANCH_EMULATED_AMX)
  // Not elsewhere: its own code has the instructions of the level below.
  if (specbranch::isa() >= specbranch::Isa::bf16) specbranch::emulated_amx::trap();
#endif
  return check::main(argc, argv);
}

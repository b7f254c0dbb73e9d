// Blocks of weights: exact products have the bits of those over the blocks' values, fast ones those of plain code.
#include "linear/packed_blocks.h"
#include "products.h"

namespace specbranch {
namespace {

const WeightFormat block_formats[] = {WeightFormat::q8_0, WeightFormat::q4_0, WeightFormat::q4_1, WeightFormat::q4_k,
                                      WeightFormat::q5_0, WeightFormat::q5_1, WeightFormat::q5_k, WeightFormat::q6_k};

// Some runs, packed where nobody may read on.
template <typename Layout>
struct Blocks {
  explicit Blocks(const Layout& layout)
      : layout(layout), runs(layout.out * layout.runs()), data(static_cast<size_t>(layout.bytes()), 64) {
    std::mt19937 generator(static_cast<unsigned>(layout.in + layout.out));
    memset(data.data, 0, static_cast<size_t>(layout.bytes()));
    uint16_t d = 0, dmin = 0;
    for (int64_t i = 0; i < layout.out * layout.runs(); ++i) {
      if (i % layout.runs() % layout.block_runs == 0) {
        d = static_cast<uint16_t>(0x1000 + generator() % 0x1800) | static_cast<uint16_t>(generator() % 2 << 15);
        dmin = layout.format.minimum ? static_cast<uint16_t>(0x1000 + generator() % 0x1800) : 0;
      }
      Run& run = runs[i];
      for (uint8_t& code : run.codes) code = static_cast<uint8_t>(generator() % (1u << layout.format.bits));
      run.d = {d};
      run.dmin = {dmin};
      for (uint8_t& scale : run.scale) scale = static_cast<uint8_t>(generator() % (layout.format.minimum ? 64 : 256));
      run.minimum = static_cast<uint8_t>(generator() % 64);
      layout.put(data.data, i / layout.runs(), i % layout.runs(), run);
    }
  }
  // The values of an output's run.
  double scale(const Run& run, int e) const {
    const double own = layout.format.minimum ? run.scale[0] : static_cast<int8_t>(run.scale[e / layout.format.scaled]);
    return to_float(run.d) * (layout.format.nested() ? own : 1.0);
  }
  double minimum(const Run& run) const {
    return layout.format.minimum ? to_float(run.dmin) * (layout.format.nested() ? run.minimum : 1.0) : 0.0;
  }
  PackedLinearParams params(WeightFormat format, Arithmetic arithmetic) const {
    PackedLinearParams q;
    q.weight.format = format;
    q.weight.arithmetic = arithmetic;
    q.weight.out = layout.out;
    q.weight.in = layout.in;
    q.weight.data = tensor(data.data, Dtype::uint8, 1, layout.bytes());
    return q;
  }
  Layout layout;
  std::vector<Run> runs;
  Guarded<uint8_t> data;
};

const Case block_cases[] = {{256, 1}, {512, 37}, {1280, 20}, {768, 130}, {2048, 600},
                            {0, 5},   {256, 0},  {32, 16},   {288, 19}};

TEST(exact_products_over_blocks_have_the_bits_of_their_values) {
  for_levels([](const Level& level) {
    for (const WeightFormat format : block_formats) {
      for (const Case& size : block_cases) {
        if (size.in % block_format(format).weights != 0) continue;
        Problem p(level, size);
        with_packed_blocks(format, Arithmetic::exact, p.out, p.in, [&](auto layout) {
          const Blocks<decltype(layout)> blocks(layout);
          for (int64_t i = 0; i < p.out * layout.runs(); ++i) {
            Bfloat16* const weights = p.weight.data + i * run_size;
            layout.decode(blocks.data.data, i / layout.runs(), i % layout.runs(), weights);
            const Run& run = blocks.runs[i];
            for (int e = 0; e < run_size; ++e) {
              const double value = blocks.scale(run, e) * (run.codes[e] - layout.format.zero) - blocks.minimum(run);
              CHECK_EQUAL(weights[e].bits & 0x7FFF, rounded(static_cast<float>(value)).bits & 0x7FFF);
            }
          }
          for (const int64_t rows : row_counts(level, size)) {
            p.with_bias = rows % 3 != 0;
            p.linear(0, rows, 2);
            const std::vector<uint16_t> expected = p.bits(rows);
            PackedLinearParams q = blocks.params(format, Arithmetic::exact);
            p.product(level.packed_linear, q, 0, rows, 2);
            CHECK(p.bits(rows) == expected);
          }
        });
      }
    }
  });
}

// As cpu/fast.h says, in plain code.
std::vector<uint16_t> fast_row(const Problem& p, const Bfloat16* input,
                               const std::function<const Run&(int64_t)>& run_of, const BlockFormat& format) {
  std::vector<float> scales;
  std::vector<int> codes(p.in);
  for (int64_t k = 0; k < p.in; k += run_size) {
    float most = 0;
    for (int e = 0; e < run_size; ++e) most = std::max(most, std::fabs(wide(input[k + e])));
    scales.push_back(most / 127);
    for (int e = 0; e < run_size; ++e) {
      codes[k + e] = most > 0 ? static_cast<int>(std::nearbyint(wide(input[k + e]) * (127 / most))) : 0;
    }
  }
  std::vector<uint16_t> row;
  const int64_t runs = p.in / run_size;
  for (int64_t o = 0; o < p.out; ++o) {
    float y = 0;
    for (int64_t n = 0; n < runs; ++n) {
      const Run& run = run_of(o * runs + n);
      const int* const q = codes.data() + n * run_size;
      int total = 0;
      for (int e = 0; e < run_size; ++e) total += q[e];
      for (int h = 0; h < run_size / format.scaled; ++h) {
        int sum = 0;
        for (int e = h * format.scaled; e < (h + 1) * format.scaled; ++e) sum += (run.codes[e] - format.zero) * q[e];
        float scale = to_float(run.d);
        if (format.nested())
          scale *= static_cast<float>(format.minimum ? run.scale[0] : static_cast<int8_t>(run.scale[h]));
        y = std::fma(static_cast<float>(sum), scale * scales[n], y);
      }
      if (format.minimum) {
        const float minimum = to_float(run.dmin) * (format.nested() ? static_cast<float>(run.minimum) : 1.0f);
        y = std::fma(-minimum, scales[n] * static_cast<float>(total), y);
      }
    }
    row.push_back(rounded(p.with_bias ? y + wide(p.bias.data[o]) : y).bits);
  }
  return row;
}

TEST(fast_products_over_blocks_are_those_of_plain_code) {
  for_levels([](const Level& level) {
    for (const WeightFormat format : block_formats) {
      for (const Case& size : block_cases) {
        if (size.in % block_format(format).weights != 0) continue;
        Problem p(level, size);
        with_packed_blocks(format, Arithmetic::fast, p.out, p.in, [&](auto layout) {
          const Blocks<decltype(layout)> blocks(layout);
          for (const bool with_bias : {true, false}) {
            p.with_bias = with_bias;
            std::vector<uint16_t> expected;
            const int64_t most = std::min<int64_t>(p.most, 30);
            for (int64_t row = 0; row < most; ++row) {
              const std::vector<uint16_t> one = fast_row(
                  p, p.input.data + row * p.in, [&](int64_t i) -> const Run& { return blocks.runs[i]; }, layout.format);
              expected.insert(expected.end(), one.begin(), one.end());
            }
            for (const int64_t rows : {1, 2, 3, 4, 5, 8, 11, 12, 13, 16, 17, 21, 30}) {
              const int64_t row = rows % 2 == 0 ? 0 : most - rows;
              const auto first = expected.begin() + row * p.out;
              PackedLinearParams q = blocks.params(format, Arithmetic::fast);
              p.product(level.packed_linear, q, row, rows, 1 + static_cast<int>(rows % 3));
              CHECK(p.bits(rows) == std::vector<uint16_t>(first, first + rows * p.out));
            }
          }
        });
      }
    }
  });
}

}  // namespace
}  // namespace specbranch

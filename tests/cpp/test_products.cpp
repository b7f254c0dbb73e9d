// The products of bfloat16 by the processor's own instructions: rows that do not notice each other, packed weights with
// the same bits, and no read beyond a tensor's end. Here so that a cross compiler and an emulator can run them too;
// products in tiles run with their instructions in software (emulated_amx.h).
#include <malloc.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <thread>

#include "check.h"
#include "core/isa.h"
#include "linear/linear.h"
#include "linear/lossless.h"
#include "linear/packed_blocks.h"
#include "linear/packed_linear.h"
#if defined(SPECBRANCH_EMULATED_AMX)
#include "emulated_amx.h"
#endif

namespace specbranch {
namespace cpu {
namespace bf16 {
void linear(const LinearParams&);
void packed_linear(const PackedLinearParams&);
}  // namespace bf16
namespace amx {
void linear(const LinearParams&);
void packed_linear(const PackedLinearParams&);
}  // namespace amx
}  // namespace cpu

namespace {

struct Level {
  const char* name;
  void (*linear)(const LinearParams&);
  void (*packed_linear)(const PackedLinearParams&);
  std::vector<int64_t> row_counts, row_counts_of_long;
};

std::vector<Level> levels() {
  const std::vector<int64_t> few{1, 2, 3, 5, 6, 7, 8, 9, 12, 14, 15, 16, 17, 19, 40, 300};
  std::vector<Level> found{{"bf16", cpu::bf16::linear, cpu::bf16::packed_linear, few, {1, 5, 8, 9, 14, 16, 17, 50}}};
#if defined(SPECBRANCH_EMULATED_AMX)
  Level amx{"amx, emulated", cpu::amx::linear, cpu::amx::packed_linear, {256, 300, 520}, {1, 16, 17, 32, 33, 48, 70}};
  for (int64_t rows = 1; rows <= 70; ++rows) amx.row_counts.push_back(rows);
  found.push_back(amx);
#endif
  return found;
}

struct Case {
  int64_t in, out;
};
const Case cases[] = {{1, 1},    {7, 9},     {8, 8},     {33, 31},    {64, 70},  {32, 64}, {96, 48},
                      {100, 77}, {1600, 37}, {3100, 20}, {1100, 130}, {64, 600}, {0, 5},   {5, 0}};

const std::vector<int64_t>& row_counts(const Level& level, const Case& size) {
  return size.in < 1000 ? level.row_counts : level.row_counts_of_long;
}

Bfloat16 rounded(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

float wide(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// Memory whose last byte is the last before a page that nobody may touch.
template <typename T>
class Guarded {
 public:
  explicit Guarded(size_t count, size_t alignment = alignof(T)) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = count * sizeof(T);
    const size_t whole = (bytes + page - 1) / page * page;
    size_ = whole + page;
    memory_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char* const end = static_cast<char*>(memory_) + whole;
    mprotect(end, page, PROT_NONE);
    data = reinterpret_cast<T*>(end - (bytes + alignment - 1) / alignment * alignment);
  }
  ~Guarded() { munmap(memory_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  T* data;

 private:
  void* memory_;
  size_t size_;
};

Tensor tensor(void* data, Dtype dtype, int64_t rows, int64_t width) {
  Tensor t;
  t.data = data;
  t.dtype = dtype;
  t.dims = 2;
  t.shape[0] = rows;
  t.shape[1] = t.stride[0] = width;
  t.stride[1] = 1;
  return t;
}

struct Problem {
  // gap: between the rows of the weight.
  Problem(const Level& level, Case size, int64_t gap = 0)
      : level(level),
        most(most_rows(level, size)),
        in(size.in),
        out(size.out),
        stride(in + gap),
        weight(out > 0 ? (out - 1) * stride + in : 0),
        input(most * in),
        bias(out),
        output(most * out) {
    std::mt19937 generator(static_cast<unsigned>(in * 1000 + out));
    std::normal_distribution<float> normal;
    std::vector<Bfloat16> values(in * out);
    for (Bfloat16& value : values) value = rounded(normal(generator) / std::sqrt(static_cast<float>(in)));
    for (int64_t i = 0; i < in * out; i += 5) values[i] = rounded(wide(values[i]) * std::exp2(normal(generator) * 15));
    for (int64_t i = 0; i < in * out; i += 11) values[i] = {0};
    for (int64_t i = 0; i + 1 < out * stride; ++i) {
      const int64_t o = i / stride, k = i % stride;
      if (k < in) {
        weight.data[i] = values[o * in + k];
      } else if (o + 1 < out) {
        weight.data[i] = not_a_number;
      }
    }
    if (in * out > 0) weight.data[(out - 1) * stride + in - 1] = values.back();
    for (int64_t i = 0; i < most * in; ++i) input.data[i] = rounded(normal(generator));
    for (int64_t i = 0; i < out; ++i) bias.data[i] = rounded(normal(generator));
  }

  template <typename Params>
  void product(void (*run)(const Params&), Params& p, int64_t row, int64_t rows, int threads) {
    for (int64_t i = 0; i < most * out; ++i) output.data[i] = not_a_number;
    CHECK(row + rows <= most);
    p.launch.threads = threads;
    p.input = tensor(input.data + row * in, Dtype::bfloat16, rows, in);
    if (with_bias) p.bias = tensor(bias.data, Dtype::bfloat16, 1, out);
    p.output = tensor(output.data, Dtype::bfloat16, rows, out);
    run(p);
    for (int64_t i = rows * out; i < most * out; ++i) CHECK(output.data[i].bits == not_a_number.bits);
#if defined(SPECBRANCH_EMULATED_AMX)
    CHECK(!emulated_amx::configured());
#endif
  }

  // Rows [row, row + rows) into the output's first ones.
  void linear(int64_t row, int64_t rows, int threads) {
    LinearParams p;
    p.weight = tensor(weight.data, Dtype::bfloat16, out, in);
    p.weight.stride[0] = stride;
    product(level.linear, p, row, rows, threads);
  }

  std::vector<uint16_t> bits(int64_t rows) const {
    std::vector<uint16_t> found;
    for (int64_t i = 0; i < rows * out; ++i) found.push_back(output.data[i].bits);
    return found;
  }

  std::vector<uint16_t> one_by_one() {
    std::vector<uint16_t> found;
    for (int64_t row = 0; row < most; ++row) {
      linear(row, 1, 1);
      const std::vector<uint16_t> alone = bits(1);
      found.insert(found.end(), alone.begin(), alone.end());
    }
    return found;
  }

  static int64_t most_rows(const Level& level, Case size) {
    const std::vector<int64_t>& counts = row_counts(level, size);
    return *std::max_element(counts.begin(), counts.end());
  }

  static constexpr Bfloat16 not_a_number{0x7FFF};
  const Level& level;
  int64_t most, in, out, stride;
  bool with_bias = true;
  Guarded<Bfloat16> weight, input, bias, output;
};

bool runs_here() {
  if (isa() >= Isa::bf16) return true;
  printf("  skipped: this processor has no bfloat16 instructions\n");
  return false;
}

// Calls body(level) for all of them, where they can run.
void for_levels(const std::function<void(const Level&)>& body) {
  if (!runs_here()) return;
  for (const Level& level : levels()) {
    try {
      body(level);
    } catch (const std::exception& error) {
      throw std::logic_error(std::string(level.name) + ": " + error.what());
    }
  }
}

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

// ---- Blocks

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

const Case block_cases[] = {{256, 1}, {512, 37}, {1280, 20}, {768, 130}, {2048, 600}, {0, 5}, {256, 0}};

TEST(exact_products_over_blocks_have_the_bits_of_their_values) {
  for_levels([](const Level& level) {
    for (const WeightFormat format : block_formats) {
      for (const Case& size : block_cases) {
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
            for (const int64_t rows : {1, 2, 3, 4, 5, 8, 11, 12, 13, 30}) {
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

#if defined(SPECBRANCH_EMULATED_AMX)

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
  CHECK(dies([&] { configure(good, 2); }));
  CHECK(dies([&] { configure({{17, 64}}); }));
  CHECK(dies([&] { configure({{16, 68}}); }));
  CHECK(dies([&] { configure({{16, 0}}); }));
  CHECK(dies(multiply({{8, 64}, {16, 64}, {16, 64}})));
  CHECK(dies(multiply({{16, 32}, {16, 64}, {16, 64}})));
  CHECK(dies(multiply({{16, 64}, {16, 32}, {16, 64}})));
  CHECK(dies(multiply({{16, 6}, {16, 64}, {16, 6}})));
}

#endif

}  // namespace
}  // namespace specbranch

int main(int argc, char** argv) {
#if defined(SPECBRANCH_EMULATED_AMX)
  specbranch::emulated_amx::trap();
#endif
  return check::main(argc, argv);
}

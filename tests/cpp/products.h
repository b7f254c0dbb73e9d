// Products of bfloat16 at every level that has instructions for them, on made-up problems whose memory ends where nobody
// may read on. Products in tiles run with their instructions in software (emulated_amx.h).
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "core/isa.h"
#include "core/storage.h"
#include "linear/linear.h"
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

struct Level {
  const char* name;
  void (*linear)(const LinearParams&);
  void (*packed_linear)(const PackedLinearParams&);
  std::vector<int64_t> row_counts, row_counts_of_long;
};

inline std::vector<Level> levels() {
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

inline const std::vector<int64_t>& row_counts(const Level& level, const Case& size) {
  return size.in < 1000 ? level.row_counts : level.row_counts_of_long;
}

inline Bfloat16 rounded(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

inline float wide(Bfloat16 x) {
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

inline Tensor tensor(void* data, Dtype dtype, int64_t rows, int64_t width) {
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

inline bool runs_here() {
  if (isa() >= Isa::bf16) return true;
  printf("  skipped: this processor has no bfloat16 instructions\n");
  return false;
}

// Calls body(level) for all of them, where they can run.
inline void for_levels(const std::function<void(const Level&)>& body) {
  if (!runs_here()) return;
  for (const Level& level : levels()) {
    try {
      body(level);
    } catch (const std::exception& error) {
      throw std::logic_error(std::string(level.name) + ": " + error.what());
    }
  }
}

}  // namespace specbranch

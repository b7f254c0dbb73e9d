// The products of bfloat16 by the processor's own instructions: rows that do not notice each other, packed weights with
// the same bits, and no read beyond a tensor's end. Here so that a cross compiler and an emulator can run them too.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <random>

#include "check.h"
#include "core/isa.h"
#include "linear/linear.h"
#include "linear/lossless.h"
#include "linear/packed_linear.h"

namespace specbranch {
namespace cpu::bf16 {
void linear(const LinearParams&);
void packed_linear(const PackedLinearParams&);
}  // namespace cpu::bf16

namespace {

struct Case {
  int64_t in, out;
};
const Case cases[] = {{1, 1}, {7, 9}, {8, 8}, {33, 31}, {64, 70}, {100, 77}, {1600, 37}, {3100, 20}};
const int64_t row_counts[] = {1, 2, 3, 5, 6, 7, 8, 9, 12, 14, 15, 16, 17, 19, 40};

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
  explicit Problem(Case size)
      : in(size.in), out(size.out), weight(in * out), input(most * in), bias(out), output(most * out) {
    std::mt19937 generator(static_cast<unsigned>(in * 1000 + out));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < in * out; ++i)
      weight.data[i] = rounded(normal(generator) / std::sqrt(static_cast<float>(in)));
    for (int64_t i = 0; i < in * out; i += 5)
      weight.data[i] = rounded(wide(weight.data[i]) * std::exp2(normal(generator) * 15));
    for (int64_t i = 0; i < in * out; i += 11) weight.data[i] = {0};
    for (int64_t i = 0; i < most * in; ++i) input.data[i] = rounded(normal(generator));
    for (int64_t i = 0; i < out; ++i) bias.data[i] = rounded(normal(generator));
  }

  // Rows [row, row + rows) into the output's first ones.
  void linear(int64_t row, int64_t rows, int threads) {
    LinearParams p;
    p.launch.threads = threads;
    p.input = tensor(input.data + row * in, Dtype::bfloat16, rows, in);
    p.weight = tensor(weight.data, Dtype::bfloat16, out, in);
    p.bias = tensor(bias.data, Dtype::bfloat16, 1, out);
    p.output = tensor(output.data, Dtype::bfloat16, rows, out);
    cpu::bf16::linear(p);
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

  static constexpr int64_t most = 40;
  int64_t in, out;
  Guarded<Bfloat16> weight, input, bias, output;
};

bool runs_here() {
  if (isa() == Isa::bf16) return true;
  printf("  skipped: this processor has no bfloat16 instructions\n");
  return false;
}

TEST(values_are_those_of_a_double_sum) {
  if (!runs_here()) return;
  for (const Case& size : cases) {
    Problem p(size);
    p.linear(0, 3, 1);
    for (int64_t r = 0; r < 3; ++r) {
      for (int64_t o = 0; o < p.out; ++o) {
        double sum = wide(p.bias.data[o]), magnitude = std::fabs(sum);
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

TEST(rows_do_not_notice_each_other) {
  if (!runs_here()) return;
  for (const Case& size : cases) {
    Problem p(size);
    const std::vector<uint16_t> alone = p.one_by_one();
    for (const int64_t rows : row_counts) {
      for (const int threads : {1, 3}) {
        p.linear(0, rows, threads);
        CHECK(p.bits(rows) == std::vector<uint16_t>(alone.begin(), alone.begin() + rows * p.out));
      }
    }
  }
}

TEST(packed_weights_have_the_same_bits) {
  if (!runs_here()) return;
  for (const Case& size : cases) {
    Problem p(size);
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
    for (const int64_t rows : row_counts) {
      p.linear(0, rows, 2);
      const std::vector<uint16_t> expected = p.bits(rows);
      PackedLinearParams q;
      q.launch.threads = 2;
      q.input = tensor(p.input.data, Dtype::bfloat16, rows, p.in);
      q.weight.out = p.out;
      q.weight.in = p.in;
      q.weight.data = tensor(data.data, Dtype::uint8, 1, bytes);
      q.bias = tensor(p.bias.data, Dtype::bfloat16, 1, p.out);
      q.output = tensor(p.output.data, Dtype::bfloat16, rows, p.out);
      cpu::bf16::packed_linear(q);
      CHECK(p.bits(rows) == expected);
    }
  }
}

}  // namespace
}  // namespace specbranch

int main(int argc, char** argv) { return check::main(argc, argv); }

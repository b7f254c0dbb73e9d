#include "emulated_amx.h"

#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace specbranch::emulated_amx {
namespace {

constexpr int tiles = 8, most_rows = 16, most_bytes = 64, most_floats = most_bytes / 4;

struct Tile {
  int rows = 0, bytes = 0;  // bytes of a row
  alignas(64) unsigned char data[most_rows][most_bytes] = {};

  float* floats(int row) { return reinterpret_cast<float*>(data[row]); }
};

thread_local Tile file[tiles];
thread_local bool is_configured = false;

[[noreturn]] void fail(const char* instruction, const char* what) {
  std::fprintf(stderr, "%s: %s\n", instruction, what);
  std::abort();
}

void expect(bool good, const char* instruction, const char* what) {
  if (!good) fail(instruction, what);
}

Tile& tile_of(int tile, const char* instruction) {
  expect(is_configured, instruction, "tiles are not configured");
  expect(tile >= 0 && tile < tiles, instruction, "no such tile");
  expect(file[tile].rows > 0 && file[tile].bytes > 0, instruction, "this tile is not configured");
  return file[tile];
}

// Subnormal numbers count as 0 and results round to nearest even, whatever the thread's own mode.
class Mode {
 public:
  Mode() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80 | 0x8000 | 0x0040); }
  ~Mode() { _mm_setcsr(before_); }
  Mode(const Mode&) = delete;
  Mode& operator=(const Mode&) = delete;

 private:
  unsigned before_;
};

// A row of bfloat16 pairs as float32: the pairs' first and second elements.
void widen(const unsigned char* from, float* even, float* odd) {
  for (int i = 0; i < most_floats; ++i) {
    uint32_t both;
    std::memcpy(&both, from + 4 * i, sizeof both);
    const uint32_t low = both << 16, high = both & 0xFFFF0000u;
    std::memcpy(even + i, &low, sizeof low);
    std::memcpy(odd + i, &high, sizeof high);
  }
}

// Not inlined: its arithmetic stays between the changes of mode.
__attribute__((noinline)) void add(Tile& sums, const Tile& a, const Tile& b) {
  const int pairs = a.bytes / 4, columns = sums.bytes / 4;
  float a_even[most_floats], a_odd[most_floats], b_even[most_rows][most_floats], b_odd[most_rows][most_floats];
  for (int k = 0; k < pairs; ++k) widen(b.data[k], b_even[k], b_odd[k]);
  for (int m = 0; m < sums.rows; ++m) {
    widen(a.data[m], a_even, a_odd);
    float even[most_floats] = {}, odd[most_floats] = {};
    for (int k = 0; k < pairs; ++k) {
      for (int n = 0; n < most_floats; ++n) {
        even[n] = std::fma(a_even[k], b_even[k][n], even[n]);
        odd[n] = std::fma(a_odd[k], b_odd[k][n], odd[n]);
      }
    }
    float* const row = sums.floats(m);
    for (int n = 0; n < columns; ++n) row[n] += even[n] + odd[n];
  }
}

// The instruction at a fault.
class Instruction {
 public:
  explicit Instruction(ucontext_t& context) : registers_(context.uc_mcontext.gregs) {
    at_ = reinterpret_cast<const uint8_t*>(registers_[REG_RIP]);
  }

  // Does it and goes behind it; false if it is none of ours.
  bool run() {
    if (at_[0] != 0xC4 || (at_[1] & 0x1F) != 2) return false;  // VEX of three bytes, map 0F38
    no_x_ = (at_[1] & 0x40) != 0;
    no_b_ = (at_[1] & 0x20) != 0;
    const int prefix = at_[2] & 3, vvvv = ~(at_[2] >> 3) & 15, opcode = at_[3];
    const bool plain = (at_[1] & 0x80) != 0 && (at_[2] & 0x84) == 0;  // no more than 8 tiles, W0, 128 bits
    mod_ = at_[4] >> 6;
    rm_ = at_[4] & 7;
    const int reg = at_[4] >> 3 & 7;
    at_ += 5;
    constexpr int none = 0, f3 = 2, f2 = 3;
    if (!plain) return false;
    if (opcode == 0x49 && prefix == none && mod_ == 3 && reg == 0 && rm_ == 0) {
      release();
    } else if (opcode == 0x49 && prefix == none && mod_ != 3 && reg == 0) {
      load_config(address());
    } else if (opcode == 0x49 && prefix == f2 && mod_ == 3 && rm_ == 0) {
      zero(reg);
    } else if (opcode == 0x4B && prefix == f2 && mod_ != 3 && rm_ == 4) {
      char* const rows = address();
      load(reg, rows, stride_);
    } else if (opcode == 0x4B && prefix == f3 && mod_ != 3 && rm_ == 4) {
      char* const rows = address();
      store(reg, rows, stride_);
    } else if (opcode == 0x5C && prefix == f3 && mod_ == 3) {
      add_products(reg, rm_, vvvv);
    } else if (opcode == 0x5E && prefix == f2 && mod_ == 3) {
      add_byte_products(reg, rm_, vvvv);
    } else {
      return false;
    }
    registers_[REG_RIP] = reinterpret_cast<greg_t>(at_);
    return true;
  }

 private:
  int64_t value_of(int number) const {
    static const int names[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return registers_[names[number]];
  }

  template <typename T>
  int64_t displacement() {
    T value;
    std::memcpy(&value, at_, sizeof value);
    at_ += sizeof value;
    return value;
  }

  // Without the index, which is the stride of an instruction that has rows.
  char* address() {
    int base = rm_;
    if (rm_ == 4) {
      const int sib = *at_++, index = (sib >> 3 & 7) + (no_x_ ? 0 : 8);
      base = sib & 7;
      stride_ = index == 4 ? 0 : value_of(index) << (sib >> 6);
    }
    int64_t sum = 0;
    if (mod_ == 0 && base == 5) {
      sum = displacement<int32_t>();
      if (rm_ == 5) sum += reinterpret_cast<int64_t>(at_);
    } else {
      sum = value_of(base + (no_b_ ? 0 : 8));
      if (mod_ == 1) sum += displacement<int8_t>();
      if (mod_ == 2) sum += displacement<int32_t>();
    }
    return reinterpret_cast<char*>(sum);
  }

  greg_t* registers_;
  const uint8_t* at_;
  bool no_x_ = true, no_b_ = true;
  int mod_ = 0, rm_ = 0;
  int64_t stride_ = 0;
};

void on_unknown_instruction(int, siginfo_t*, void* context) {
  if (!Instruction(*static_cast<ucontext_t*>(context)).run()) signal(SIGILL, SIG_DFL);  // and once more
}

}  // namespace

bool has_tiles() {
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return granted;
}

void trap() {
  if (has_tiles()) return;
  struct sigaction action = {};
  action.sa_sigaction = on_unknown_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

void load_config(const void* config) {
  const char* const name = "LDTILECFG";
  unsigned char bytes[64];
  std::memcpy(bytes, config, sizeof bytes);
  expect(bytes[0] == 1, name, "palette is not 1");
  expect(bytes[1] == 0, name, "start_row is not 0");
  for (int i = 2; i < 16; ++i) expect(bytes[i] == 0, name, "a reserved byte is not 0");
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof row_bytes);
    const int rows = bytes[48 + i];
    if (i >= tiles) {
      expect(rows == 0 && row_bytes == 0, name, "a tile that there is not");
      continue;
    }
    expect(rows <= most_rows && row_bytes <= most_bytes, name, "a tile is too large");
    expect((rows == 0) == (row_bytes == 0), name, "a tile has no rows or no columns");
    file[i] = Tile();
    file[i].rows = rows;
    file[i].bytes = row_bytes;
  }
  is_configured = true;
}

void release() {
  for (Tile& tile : file) tile = Tile();
  is_configured = false;
}

void zero(int tile) { std::memset(tile_of(tile, "TILEZERO").data, 0, sizeof(Tile::data)); }

void load(int tile, const void* rows, int64_t stride) {
  Tile& t = tile_of(tile, "TILELOADD");
  std::memset(t.data, 0, sizeof t.data);
  for (int i = 0; i < t.rows; ++i) {
    std::memcpy(t.data[i], static_cast<const char*>(rows) + i * stride, static_cast<size_t>(t.bytes));
  }
}

void store(int tile, void* rows, int64_t stride) {
  const Tile& t = tile_of(tile, "TILESTORED");
  for (int i = 0; i < t.rows; ++i) {
    std::memcpy(static_cast<char*>(rows) + i * stride, t.data[i], static_cast<size_t>(t.bytes));
  }
}

void check_factors(const char* name, int sums, int a, int b) {
  const Tile &c = tile_of(sums, name), &left = tile_of(a, name), &right = tile_of(b, name);
  expect(sums != a && sums != b && a != b, name, "a tile is named twice");
  expect(c.bytes % 4 == 0 && left.bytes % 4 == 0 && right.bytes % 4 == 0, name, "a row is no whole number of words");
  expect(c.rows == left.rows, name, "sums and first factor have not the same rows");
  expect(c.bytes == right.bytes, name, "sums and second factor have not the same columns");
  expect(left.bytes / 4 == right.rows, name, "the factors' sizes do not match");
}

void add_products(int sums, int a, int b) {
  check_factors("TDPBF16PS", sums, a, b);
  const Mode mode;
  add(file[sums], file[a], file[b]);
}

void add_byte_products(int sums, int a, int b) {
  check_factors("TDPBSSD", sums, a, b);
  const Tile &left = file[a], &right = file[b];
  for (int m = 0; m < left.rows; ++m) {
    for (int n = 0; n < right.bytes / 4; ++n) {
      uint32_t sum;  // which wraps around
      unsigned char* const to = file[sums].data[m] + 4 * n;
      std::memcpy(&sum, to, sizeof sum);
      for (int i = 0; i < left.bytes; ++i) {
        const int factor = static_cast<int8_t>(left.data[m][i]);
        sum += static_cast<uint32_t>(factor * static_cast<int8_t>(right.data[i / 4][4 * n + i % 4]));
      }
      std::memcpy(to, &sum, sizeof sum);
    }
  }
}

bool configured() {
  if (!has_tiles()) return is_configured;
  alignas(64) unsigned char config[64] = {};
  asm volatile("sttilecfg %0" : "=m"(config));
  return config[0] != 0;
}

}  // namespace specbranch::emulated_amx

// The emulator's conversions and bit functions against slow, obvious ones.
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>

#include "check.h"
#include "core/cuda/device.h"

namespace {

using specbranch::Bfloat16;
using specbranch::Float16;
using specbranch::cuda::from_float;
using specbranch::cuda::to_float;

// The value of a finite half, from its definition.
double half_value(unsigned bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31u), mantissa = static_cast<int>(bits & 0x3FFu);
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return (bits & 0x8000u) != 0 ? -magnitude : magnitude;
}

unsigned half_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }

}  // namespace

TEST(every_half_becomes_its_value) {
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const float x = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    if ((bits & 0x7C00u) == 0x7C00u) {
      if ((bits & 0x3FFu) != 0) {
        CHECK_EQUAL(__float_as_uint(x), 0x7FFFFFFFu);
      } else {
        CHECK(std::isinf(x) && (x < 0) == ((bits & 0x8000u) != 0));
      }
    } else {
      CHECK_EQUAL(static_cast<double>(x), half_value(bits));
      CHECK_EQUAL(std::signbit(x), (bits & 0x8000u) != 0);
    }
  }
}

TEST(every_half_comes_back) {
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const bool nan = (bits & 0x7FFFu) > 0x7C00u;
    CHECK_EQUAL(half_bits(__half2float(__ushort_as_half(static_cast<unsigned short>(bits)))), nan ? 0x7FFFu : bits);
  }
}

// Between each pair of neighbouring halves: the middle goes to the even one, and everything else to the nearer one.
TEST(floats_round_to_the_nearest_half) {
  for (unsigned bits = 0; bits < 0x7C00u; ++bits) {
    const double low = half_value(bits);
    const double high = bits == 0x7BFFu ? 65536.0 : half_value(bits + 1);  // infinity counts as the next one
    const float middle = static_cast<float>((low + high) / 2);
    CHECK_EQUAL(static_cast<double>(middle), (low + high) / 2);
    const unsigned even = (bits & 1u) == 0 ? bits : bits + 1;
    CHECK_EQUAL(half_bits(middle), even);
    CHECK_EQUAL(half_bits(-middle), even | 0x8000u);
    CHECK_EQUAL(half_bits(std::nextafterf(middle, 0.0f)), bits);
    CHECK_EQUAL(half_bits(-std::nextafterf(middle, INFINITY)), (bits + 1) | 0x8000u);
    CHECK_EQUAL(half_bits(static_cast<float>(low + (high - low) / 4)), bits);
    CHECK_EQUAL(half_bits(static_cast<float>(low + (high - low) * 3 / 4)), bits + 1);
  }
}

TEST(special_floats_as_half) {
  CHECK_EQUAL(half_bits(0.0f), 0u);
  CHECK_EQUAL(half_bits(-0.0f), 0x8000u);
  CHECK_EQUAL(half_bits(INFINITY), 0x7C00u);
  CHECK_EQUAL(half_bits(-INFINITY), 0xFC00u);
  CHECK_EQUAL(half_bits(3e38f), 0x7C00u);
  CHECK_EQUAL(half_bits(-1e30f), 0xFC00u);
  CHECK_EQUAL(half_bits(1e-45f), 0u);
  CHECK_EQUAL(half_bits(-1e-20f), 0x8000u);
  CHECK_EQUAL(half_bits(NAN), 0x7FFFu);
  CHECK_EQUAL(half_bits(__uint_as_float(0xFF800001u)), 0x7FFFu);
  // A coarse walk over all floats: order is kept.
  unsigned last = 0;
  for (uint32_t bits = 0; bits < 0x7F800000u; bits += 977) {
    const unsigned half = half_bits(__uint_as_float(bits));
    CHECK(half >= last && half <= 0x7C00u);
    last = half;
  }
}

TEST(bfloat16_of_device_h) {
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const Bfloat16 b{static_cast<uint16_t>(bits)};
    const float x = to_float(b);
    if (std::isnan(x)) {
      CHECK(std::isnan(to_float(from_float<Bfloat16>(x))));
      continue;
    }
    CHECK_EQUAL(from_float<Bfloat16>(x).bits, bits);
    if (std::isinf(x)) continue;
    const uint32_t word = bits << 16;  // the middle between this one and the next one further from 0
    CHECK_EQUAL(from_float<Bfloat16>(__uint_as_float(word | 0x8000u)).bits, bits + (bits & 1u));
    CHECK_EQUAL(from_float<Bfloat16>(__uint_as_float(word | 0x7FFFu)).bits, bits);
    CHECK_EQUAL(from_float<Bfloat16>(__uint_as_float(word | 0x8001u)).bits, bits + 1);
  }
  CHECK_EQUAL(to_float(Float16{0x3C00}), 1.0f);
  CHECK_EQUAL(from_float<Float16>(-2.0f).bits, 0xC000);
}

TEST(multiply_add_rounded_down) {
  const float tiny = 1.401298464324817e-45f, largest = 3.4028234663852886e38f;
  CHECK_EQUAL(__fmaf_rd(1.5f, 2.0f, 4.0f), 7.0f);
  CHECK_EQUAL(__fmaf_rd(0.3f, 1048576.0f, 8388608.0f), 8388608.0f + 314572.0f);
  CHECK_EQUAL(__fmaf_rd(-0.3f, 1048576.0f, 8388608.0f), 8388608.0f - 314573.0f);
  CHECK_EQUAL(__fmaf_rd(tiny, tiny, 1.0f), 1.0f);
  CHECK_EQUAL(__fmaf_rd(-tiny, tiny, 1.0f), std::nextafterf(1.0f, 0.0f));
  CHECK_EQUAL(__fmaf_rd(tiny, 0.5f, 0.0f), 0.0f);
  CHECK_EQUAL(__fmaf_rd(-tiny, 0.25f, 0.0f), -tiny);
  CHECK_EQUAL(__fmaf_rd(largest, 2.0f, 0.0f), largest);
  CHECK_EQUAL(__fmaf_rd(-largest, 2.0f, 0.0f), -INFINITY);
  CHECK_EQUAL(__fmaf_rd(INFINITY, 2.0f, 0.0f), INFINITY);
  CHECK(std::isnan(__fmaf_rd(INFINITY, 0.0f, 0.0f)));
  CHECK(std::signbit(__fmaf_rd(1.0f, 1.0f, -1.0f)));
  CHECK(!std::signbit(__fmaf_rd(0.0f, 1.0f, 0.0f)));
  // Against the processor.
  uint64_t state = 1;
  volatile float a, b, c, down;
  for (int round = 0; round < 200000; ++round) {
    float values[3];
    for (float& value : values) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      // Exponents near each other's, so that every part of the sum matters.
      const unsigned bits = static_cast<unsigned>(state >> 32);
      value = __uint_as_float((bits & 0x807FFFFFu) | (110 + (bits >> 23 & 31u)) << 23);
    }
    a = values[0], b = values[1], c = values[2];
    std::fesetround(FE_DOWNWARD);
    down = std::fma(a, b, c);
    std::fesetround(FE_TONEAREST);
    CHECK_EQUAL(__fmaf_rd(values[0], values[1], values[2]), static_cast<float>(down));
  }
}

TEST(bit_functions) {
  uint64_t state = 1;
  for (int round = 0; round < 10000; ++round) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint64_t x = round < 65 ? (round == 64 ? 0 : uint64_t{1} << round) : state >> (round % 60);
    const unsigned low = static_cast<unsigned>(x), high = static_cast<unsigned>(state >> 32);
    int count = 0, count_64 = 0, leading = 32, leading_64 = 64, first = 0, first_64 = 0;
    unsigned reversed = 0;
    for (int i = 63; i >= 0; --i) {
      if (!(x >> i & 1u)) continue;
      ++count_64;
      leading_64 = std::min(leading_64, 63 - i);
      first_64 = i + 1;
      if (i >= 32) continue;
      ++count;
      leading = std::min(leading, 31 - i);
      first = i + 1;
      reversed |= 1u << (31 - i);
    }
    CHECK_EQUAL(__popc(low), count);
    CHECK_EQUAL(__popcll(x), count_64);
    CHECK_EQUAL(__clz(static_cast<int>(low)), leading);
    CHECK_EQUAL(__clzll(static_cast<long long>(x)), leading_64);
    CHECK_EQUAL(__ffs(static_cast<int>(low)), first);
    CHECK_EQUAL(__ffsll(static_cast<long long>(x)), first_64);
    CHECK_EQUAL(__brev(low), reversed);
    CHECK_EQUAL(__brevll(x), static_cast<unsigned long long>(reversed) << 32 | __brev(static_cast<unsigned>(x >> 32)));
    CHECK_EQUAL(__umulhi(low, high), static_cast<unsigned>(static_cast<uint64_t>(low) * high >> 32));
    __extension__ using Wide = unsigned __int128;
    CHECK_EQUAL(__umul64hi(x, state), static_cast<uint64_t>(static_cast<Wide>(x) * state >> 64));
    const int shift = round % 32;
    CHECK_EQUAL(__funnelshift_l(low, high, shift), shift == 0 ? high : high << shift | low >> (32 - shift));
    CHECK_EQUAL(__funnelshift_r(low, high, shift), shift == 0 ? low : low >> shift | high << (32 - shift));
    CHECK_EQUAL(__float_as_uint(__uint_as_float(low & 0x7F7FFFFFu)), low & 0x7F7FFFFFu);
  }
}

TEST(minimum_and_maximum) {
  CHECK_EQUAL(min(-1, 1), -1);
  CHECK_EQUAL(max(-1, 1), 1);
  CHECK_EQUAL(max(-1, 1u), ~0u);  // as in CUDA: the int becomes unsigned
  CHECK_EQUAL(min(int64_t{1} << 40, int64_t{3}), 3);
  CHECK_EQUAL(max(1.5f, NAN), 1.5f);
  CHECK_EQUAL(min(NAN, 1.5f), 1.5f);
}

int main(int argc, char** argv) { return check::main(argc, argv); }

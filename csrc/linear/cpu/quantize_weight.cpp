// q8_0: d is the largest weight's 127th part. q4_0: codes are tried for several d around an eighth of the largest weight,
// and those are kept which, with the d that is best for them, leave the least square error. Sums are taken by halves, so
// that they have the same bits at every level.
#include "linear/quantize_weight.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "linear/packed_blocks.h"

namespace specbranch {
namespace cpu {
namespace SPECBRANCH_ISA {
namespace {

constexpr int run = run_size, half = half_run;
constexpr float rounding = 12582912.0f;  // added and taken away: the nearest integer, ties to even

constexpr int vectors = run / simd_width;

inline float sum(FloatVec (&x)[vectors]) {
  for (int count = vectors / 2; count > 0; count /= 2) {
    for (int i = 0; i < count; ++i) x[i] += x[i + count];
  }
  float lanes[simd_width];
  store_unaligned(lanes, x[0]);
  for (int count = simd_width / 2; count > 0; count /= 2) {
    for (int i = 0; i < count; ++i) lanes[i] += lanes[i + count];
  }
  return lanes[0];
}

// The scale of 32 weights, of which `extreme` is the largest in magnitude, and their codes, -8 to 7.
float fit_four_bits(const float* x, float extreme, float* codes) {
  float best = -1.0f, best_scale = 0.0f;
  for (int step = -4; step <= 7; ++step) {
    // The extreme weight is -9 to -6.25 steps.
    const float per_step = (-8.0f + 0.25f * static_cast<float>(step)) / extreme;
    FloatVec tried[vectors], with_codes[vectors], of_codes[vectors];
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) {
      const FloatVec weights = load(x + i * simd_width);
      const FloatVec code = weights * broadcast(per_step) + broadcast(rounding) - broadcast(rounding);
      tried[i] = max(min(code, broadcast(7.0f)), broadcast(-8.0f));
      with_codes[i] = weights * tried[i];
      of_codes[i] = tried[i] * tried[i];
    }
    const float a = sum(with_codes), b = sum(of_codes), explained = a * a / b;
    if (explained > best) {
      best = explained;
      best_scale = a / b;
      memcpy(codes, tried, sizeof tried);
    }
  }
  return best_scale;
}

// The weight that is the largest in magnitude; the first of several.
float extreme_of(const float* x) {
  float extreme = 0.0f;
  for (int e = 0; e < run; ++e) extreme = std::fabs(x[e]) > std::fabs(extreme) ? x[e] : extreme;
  return extreme;
}

void quantize(const float* x, WeightFormat format, uint8_t* block) {
  const float extreme = extreme_of(x);
  Float16 d{0};
  if (format == WeightFormat::q8_0) {
    const float scale = std::fabs(extreme) / 127.0f;
    store(&d, scale);
    for (int e = 0; e < run; ++e) {
      const float code = scale == 0.0f ? 0.0f : x[e] / scale + rounding - rounding;
      block[2 + e] = static_cast<uint8_t>(static_cast<int32_t>(code));
    }
  } else {
    float codes[run] = {};
    if (std::fabs(extreme) > 1e-30f) store(&d, fit_four_bits(x, extreme, codes));
    for (int e = 0; e < half; ++e) {
      const int low = static_cast<int>(codes[e]) + 8, high = static_cast<int>(codes[e + half]) + 8;
      block[2 + e] = static_cast<uint8_t>(low | high << 4);
    }
  }
  memcpy(block, &d, sizeof d);
}

}  // namespace

void quantize_weight(const QuantizeWeightParams& p) {
  constexpr float most = 65504.0f * 6.25f;  // the largest scale of float16 times the fewest steps
  const int64_t blocks = p.weight.shape[1] / run, bytes = block_format(p.format).bytes;
  [[maybe_unused]] const int threads = std::max(p.launch.threads, 1);
  std::atomic<int64_t> odd{-1};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < p.weight.shape[0]; ++row) {
    const Bfloat16* const from = p.weight.as<const Bfloat16>() + row * p.weight.stride[0];
    uint8_t* const to = p.blocks.as<uint8_t>() + row * blocks * bytes;
    for (int64_t i = 0; i < blocks; ++i) {
      float x[run];
      bool fits = true;
      for (int e = 0; e < run; ++e) {
        x[e] = to_float(from[i * run + e]);
        fits &= std::fabs(x[e]) < most;
      }
      if (!fits) odd = row;
      quantize(x, p.format, to + i * bytes);
    }
  }
  *p.odd_row = odd;
}

}  // namespace SPECBRANCH_ISA
}  // namespace cpu
}  // namespace specbranch

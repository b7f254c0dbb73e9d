// Products over blocks of weights in the fast arithmetic: inputs in 8 bits, products of integers.
//
// A row's inputs are rounded 32 at a time: q = round(x (127 / largest)), and their scale is largest / 127. A run of
// weights, 32 along `in`, with codes c, their zero z, scale s and minimum m, then adds to an output, in float32:
//   y = fma(float(sum of (c - z) q), s scale, y), for each scale that the run has
//   y = fma(-m, scale (sum of q), y),             where there are minima
// Runs come one after the other, so a row has the same bits whatever rows and threads there are, and as integers are
// exact, at every level. A row with an infinity or NaN gets NaN.
//
// 16 outputs lie in the lanes of a register (linear/packed_blocks.h). At every instruction-set level a run's codes are
// unpacked once for up to `fast_rows` rows; amx/fast.h has what the processor's tiles do with more.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "core/bits.h"
#include "core/cpu/memory.h"
#include "core/cpu/simd.h"
#include "linear/cpu/parallel.h"
#include "linear/packed_blocks.h"
#include "linear/packed_linear.h"

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace specbranch {
inline namespace SPECBRANCH_ISA {

typedef uint8_t CodeVec __attribute__((vector_size(4 * simd_width)));  // four codes of each output

#if defined(__AVX512F__)
constexpr int fast_rows = 12;
#else
constexpr int fast_rows = 4;
#endif
constexpr int64_t fast_pass = 256;  // rows, which bounds the scratch memory

// What the codes of a format are made before they are multiplied: signed, where the instructions take signed ones.
template <WeightFormat format>
struct FastCodes {
#if defined(__ARM_FEATURE_DOTPROD)
  static constexpr bool is_signed = block_format(format).bits == 8;
#else
  static constexpr bool is_signed = false;
#endif
  static constexpr int zero = block_format(format).zero - (is_signed ? 128 : 0);
};

// sum + the products of four codes and the four inputs at `four`, in every lane.
template <int bits>
inline IntVec add_products(IntVec sum, CodeVec codes, const int8_t* four) {
#if defined(__AVX512VNNI__)
  // The compiler would broadcast the inputs by an instruction of their own.
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const int8_t (*)[4]>(four)));
  return sum;
#else
  int32_t inputs;
  memcpy(&inputs, four, sizeof inputs);
#if defined(__AVX512BW__)
  const __m512i x = _mm512_set1_epi32(inputs), c = (__m512i)codes;
  const auto pairs = [&](__m512i part, short factor) {
    return _mm512_madd_epi16(_mm512_maddubs_epi16(part, x), _mm512_set1_epi16(factor));
  };
  if constexpr (bits < 8) return (IntVec)_mm512_add_epi32((__m512i)sum, pairs(c, 1));
  // Products of 8 bits would not fit 16.
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i upper = pairs(_mm512_and_si512(_mm512_srli_epi16(c, 4), low), 16);
  return (IntVec)_mm512_add_epi32(_mm512_add_epi32((__m512i)sum, upper), pairs(_mm512_and_si512(c, low), 1));
#elif defined(__AVX2__)
  const __m256i x = _mm256_set1_epi32(inputs), c = (__m256i)codes;
  const auto pairs = [&](__m256i part, short factor) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(part, x), _mm256_set1_epi16(factor));
  };
  if constexpr (bits < 8) return (IntVec)_mm256_add_epi32((__m256i)sum, pairs(c, 1));
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i upper = pairs(_mm256_and_si256(_mm256_srli_epi16(c, 4), low), 16);
  return (IntVec)_mm256_add_epi32(_mm256_add_epi32((__m256i)sum, upper), pairs(_mm256_and_si256(c, low), 1));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (IntVec)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, vreinterpretq_s8_s32(vdupq_n_s32(inputs)));
#else
  for (int i = 0; i < 4; ++i) {
    const int32_t x = static_cast<int8_t>(static_cast<uint32_t>(inputs) >> 8 * i);
    sum += (IntVec)((UintVec)codes >> 8 * i & 255u) * x;
  }
  return sum;
#endif
#endif
}

inline FloatVec fused(FloatVec a, FloatVec b, FloatVec c) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (FloatVec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (FloatVec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  for (int i = 0; i < simd_width; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#endif
}

// ---- Inputs

// Rows in 8 bits, the same run of `together` rows one after the other: codes [rows / together, runs, together, 32];
// scales [.., 2], a run's scale and that times the sum of its inputs; sums [.., 2] of inputs, of a run's halves.
template <int together>
struct FastInputs {
  int64_t runs;
  int8_t* codes;
  float* scales;
  int32_t* sums;

  int64_t place(int64_t row, int64_t n) const { return (row / together * runs + n) * together + row % together; }

  void round_row(const Bfloat16* from, int64_t row) const {
    constexpr int vectors = run_size / simd_width;
    for (int64_t n = 0; n < runs; ++n) {
      FloatVec x[vectors], largest{}, odd{};
      for (int i = 0; i < vectors; ++i) {
        x[i] = load(from + n * run_size + i * simd_width);
        largest = max(largest, (FloatVec)((UintVec)x[i] & 0x7FFFFFFFu));
        odd += x[i] * broadcast(0.0f);
      }
      const float most = reduce_max(largest), check = reduce_sum(odd);
      const float factor = most < 1e-30f ? 0.0f : 127.0f / most;
      const int64_t at = place(row, n);
      int8_t* const to = codes + at * run_size;
      int32_t sum[2] = {0, 0};
      for (int i = 0; i < vectors; ++i) {
        // The sum's last bits are the nearest integer, ties to even.
        const IntVec whole = (IntVec)(x[i] * broadcast(factor) + broadcast(12582912.0f)) - 0x4B400000;
        for (int lane = 0; lane < simd_width; ++lane) {
          const int8_t code = static_cast<int8_t>(whole[lane]);
          to[i * simd_width + lane] = code;
          sum[i * simd_width / half_run] += code;
        }
      }
      const float scale = check != check ? check : most < 1e-30f ? 0.0f : most / 127.0f;
      float* const both = scales + at * 2;
      both[0] = scale;
      both[1] = scale * static_cast<float>(sum[0] + sum[1]);
      memcpy(sums + at * 2, sum, sizeof sum);
    }
  }
};

// ---- Tiles

template <WeightFormat format>
using FastLayout = PackedBlocks<format, width_of(Arithmetic::fast)>;
constexpr int64_t fast_line = 64;  // bytes of a cache line

// A run's weights: codes of four elements at a time, and their scales.
template <WeightFormat format>
struct FastRun {
  using Layout = FastLayout<format>;
  static constexpr BlockFormat blocks = Layout::format;
  static constexpr int parts = run_size / 4, halves = Layout::halves;

  CodeVec codes[parts];
  FloatVec scale[halves], minimum;

  __attribute__((always_inline)) void read(const Layout& layout, const uint8_t* group, int64_t n, int lane) {
    const uint8_t* const head = group + n / layout.block_runs * layout.head_bytes;
    const FloatVec d = half_floats(head + 2 * lane);
    if constexpr (blocks.nested()) {
      const uint8_t* const scales = head + layout.d_bytes + n % layout.block_runs * layout.scales_bytes + lane;
      for (int h = 0; h < halves; ++h) scale[h] = d * byte_floats(scales + h * layout.width);
      if constexpr (blocks.minimum) {
        minimum = half_floats(head + 2 * (layout.width + lane)) * byte_floats(scales + halves * layout.width);
      }
    } else {
      scale[0] = d;
      if constexpr (blocks.minimum) minimum = half_floats(head + 2 * (layout.width + lane));
    }
    const uint8_t* const code = group + layout.codes_offset() + n * layout.codes_bytes + 4 * lane;
    const uint8_t* const top = group + layout.tops_offset() + n * layout.tops_bytes + 4 * lane;
    constexpr int64_t register_bytes = 64;
    if constexpr (blocks.bits == 8) {
#pragma GCC unroll 8
      for (int i = 0; i < parts; ++i) codes[i] = load_unaligned<CodeVec>(code + i * register_bytes);
      if constexpr (FastCodes<format>::is_signed) {
        for (int i = 0; i < parts; ++i) codes[i] ^= 128;
      }
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < parts / 2; ++i) {
        const UintVec both = load_unaligned<UintVec>(code + i * register_bytes);
        codes[i] = (CodeVec)(both & 0x0F0F0F0Fu);
        codes[i + parts / 2] = (CodeVec)(both >> 4 & 0x0F0F0F0Fu);
      }
    }
    if constexpr (blocks.bits == 5) {
      const UintVec bit = load_unaligned<UintVec>(top);
#pragma GCC unroll 8
      for (int i = 0; i < parts; ++i) {
        codes[i] |= (CodeVec)((i <= 4 ? bit << (4 - i) : bit >> (i - 4)) & 0x10101010u);
      }
    }
    if constexpr (blocks.bits == 6) {
      const UintVec bits[2] = {load_unaligned<UintVec>(top), load_unaligned<UintVec>(top + register_bytes)};
#pragma GCC unroll 8
      for (int i = 0; i < parts; ++i) {
        const UintVec two = bits[i / 4];
        const int place = i % 4 * 2;
        codes[i] |= (CodeVec)((place <= 4 ? two << (4 - place) : two >> (place - 4)) & 0x30303030u);
      }
    }
  }

 private:
  static FloatVec half_floats(const uint8_t* p) {
    Float16 halves[simd_width];
    memcpy(halves, p, sizeof halves);
    return load(halves);
  }
  // Those of formats without minima are signed.
  static FloatVec byte_floats(const uint8_t* p) {
#if defined(__AVX512F__)
    const __m128i bytes = load_unaligned<__m128i>(p);
    return (FloatVec)_mm512_cvtepi32_ps(blocks.minimum ? _mm512_cvtepu8_epi32(bytes) : _mm512_cvtepi8_epi32(bytes));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return (FloatVec)_mm256_cvtepi32_ps(blocks.minimum ? _mm256_cvtepu8_epi32(bytes) : _mm256_cvtepi8_epi32(bytes));
#else
    FloatVec values;
    for (int i = 0; i < simd_width; ++i) {
      values[i] = static_cast<float>(blocks.minimum ? int{p[i]} : int{static_cast<int8_t>(p[i])});
    }
    return values;
#endif
  }
};

template <WeightFormat format, int together = 1>
struct FastProduct {
  FastLayout<format> layout;
  const uint8_t* weights;
  FastInputs<together> inputs;
  const Bfloat16* bias;  // [out] or null
  Bfloat16* output;      // [rows, out]
  int64_t rows;

  const uint8_t* group(int64_t number) const { return weights + number * layout.group_bytes(); }
};

// Rounds to nearest, ties to even.
inline HalfBits rounded(FloatVec y) {
  const UintVec bits = (UintVec)y;
  const IntVec nan = (IntVec)((bits & 0x7FFFFFFFu) > 0x7F800000u);
  const UintVec near = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return __builtin_convertvector((UintVec)select(nan, broadcast(int32_t{0x7FC0}), (IntVec)near), HalfBits);
}

// Writes the outputs from o on of `rows` rows, of those that there are.
template <int rows, WeightFormat format, int together>
inline void finish_rows(const FastProduct<format, together>& p, int64_t o, int64_t row, const FloatVec* y) {
  const int64_t out = p.layout.out, count = std::min<int64_t>(simd_width, out - o);
  if (count <= 0) return;
  FloatVec bias{};
  if (p.bias != nullptr) {
    Bfloat16 from[simd_width] = {};
    memcpy(from, p.bias + o, static_cast<size_t>(count) * sizeof(Bfloat16));
    bias = load(from);
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    if (together > 1 && row + r >= p.rows) return;
    const HalfBits bits = rounded(p.bias == nullptr ? y[r] : y[r] + bias);
    Bfloat16* const to = p.output + (row + r) * out + o;
    if (count == simd_width) {
      store_unaligned(to, bits);
    } else {
      memcpy(to, &bits, static_cast<size_t>(count) * sizeof(Bfloat16));
    }
  }
}

// A group's outputs in `rows` rows. next: weights that are asked for meanwhile, as many bytes as a group has.
template <WeightFormat format, int rows>
__attribute__((noinline)) void fast_tile(const FastProduct<format>& p, int64_t group, int64_t row,
                                         const uint8_t* next) {
  using Weights = FastRun<format>;
  const FastLayout<format> layout = p.layout;
  const uint8_t* const data = p.group(group);
  const FastInputs<1>& in = p.inputs;
  const int64_t runs = in.runs, fetched = runs == 0 ? 0 : divide_up(layout.group_bytes(), runs * fast_line);
  for (int lane = 0; lane < layout.width; lane += simd_width) {
    FloatVec y[rows] = {};
    for (int64_t n = 0; n < runs; ++n) {
      if (lane == 0) {
        for (int64_t i = 0; i < fetched; ++i) __builtin_prefetch(next + (n * fetched + i) * fast_line);
      }
      Weights run;
      run.read(layout, data, n, lane);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const int64_t at = in.place(row + r, n);
        const int8_t* const codes = in.codes + at * run_size;
        const float* const scales = in.scales + at * 2;
        const int32_t* const sums = in.sums + at * 2;
#pragma GCC unroll 2
        for (int h = 0; h < Weights::halves; ++h) {
          constexpr int parts = Weights::parts / Weights::halves;
          IntVec sum{};
          if constexpr (FastCodes<format>::zero != 0) {
            sum = broadcast(-FastCodes<format>::zero * (Weights::halves == 2 ? sums[h] : sums[0] + sums[1]));
          }
#pragma GCC unroll 8
          for (int i = 0; i < parts; ++i) {
            sum = add_products<Weights::blocks.bits>(sum, run.codes[h * parts + i], codes + (h * parts + i) * 4);
          }
          y[r] = fused(__builtin_convertvector(sum, FloatVec), run.scale[h] * broadcast(scales[0]), y[r]);
        }
        if constexpr (Weights::blocks.minimum) y[r] = fused(-run.minimum, broadcast(scales[1]), y[r]);
      }
    }
    finish_rows<rows>(p, group * layout.width + lane, row, y);
  }
}

template <WeightFormat format, int rows = fast_rows>
void fast_tiles(const FastProduct<format>& p, int64_t group, int64_t row, int64_t count, const uint8_t* next) {
  if constexpr (rows > 1) {
    if (count < rows) return fast_tiles<format, rows - 1>(p, group, row, count, next);
  }
  fast_tile<format, rows>(p, group, row, next);
}

// ---- The product

// The groups from `begin` to `end` in all rows; `following` is what this thread goes on with.
template <WeightFormat format>
void fast_panel(const FastProduct<format>& p, int64_t begin, int64_t end, int64_t following) {
  const int64_t row_groups = divide_up(p.rows, fast_rows), last = p.layout.groups() - 1;
  for (int64_t g = 0; g < row_groups; ++g) {
    const int64_t row = p.rows * g / row_groups, count = p.rows * (g + 1) / row_groups - row;
    for (int64_t group = begin; group < end; ++group) {
      const int64_t next = g > 0 ? group : group + 1 < end ? group + 1 : std::min(following, last);
      fast_tiles<format>(p, group, row, count, p.group(next));
    }
  }
}

// Rounds the inputs and hands out panels of groups: panel_of(p, begin, end, following). most_groups: of a panel.
template <WeightFormat format, int together, typename Panel>
void fast_product(FastProduct<format, together> p, const Bfloat16* input, int threads, int64_t most_groups,
                  const Panel& panel_of) {
  thread_local Buffer<int8_t> codes;
  thread_local Buffer<float> scales;
  thread_local Buffer<int32_t> sums;
  const int64_t in = p.layout.in, runs = p.layout.runs(), groups = p.layout.groups();
  const int64_t places = divide_up(p.rows, together) * together * runs;
  p.inputs = {runs, codes.at_least(places * run_size), scales.at_least(places * 2), sums.at_least(places * 2)};
  threads = threads_for(p.rows, in, p.layout.out, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (p.rows * in > 65536)
  for (int64_t row = 0; row < p.rows; ++row) p.inputs.round_row(input + row * in, row);

  // Panels are handed out one by one, since the draft may be running on one of the cores, and one ahead, since a group
  // asks for the next one's weights.
  const int64_t panel = std::max<int64_t>(1, std::min(most_groups, groups / (32 * threads)));
  std::atomic<int64_t> next_panel{0};
#pragma omp parallel num_threads(threads)
  {
    int64_t begin = next_panel++ * panel;
    while (begin < groups) {
      const int64_t following = next_panel++ * panel;
      panel_of(p, begin, std::min(begin + panel, groups), following);
      begin = following;
    }
  }
}

// Calls multiply(product, input) for all rows, at most `fast_pass` at once.
template <int together, typename Multiply>
void fast_passes(const PackedLinearParams& params, const Multiply& multiply) {
  const int64_t rows = rows_of(params.input), in = params.weight.in, out = params.weight.out;
  const Bfloat16* const input = params.input.as<const Bfloat16>();
  Bfloat16* const output = params.output.as<Bfloat16>();
  const int64_t passes = out == 0 ? 0 : divide_up(rows, fast_pass);
  for (int64_t i = 0; i < passes; ++i) {
    const int64_t begin = rows * i / passes;
    with_block_format(params.weight.format, [&](auto format) {
      const FastProduct<format, together> p{{out, in},
                                            params.weight.data.as<const uint8_t>(),
                                            {},
                                            params.bias.as<const Bfloat16>(),
                                            output + begin * out,
                                            rows * (i + 1) / passes - begin};
      multiply(p, input + begin * in);
    });
  }
}

inline void fast(const PackedLinearParams& params) {
  fast_passes<1>(params, [&](const auto& product, const Bfloat16* input) {
    fast_product(
        product, input, params.launch.threads, product.rows > fast_rows ? 4 : 8,
        [](const auto& p, int64_t begin, int64_t end, int64_t following) { fast_panel(p, begin, end, following); });
  });
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

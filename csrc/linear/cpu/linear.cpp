// Weights are read in place, each once for up to `max_group` rows, and widened to float32 in registers.
//
// An element of the output is the sum of one vector accumulator that walks along `in` (add_product per vector, in
// load_half's order, the tail padded with zeros), summed across lanes, plus the bias, rounded once. Tiles, blocks and
// threads only decide when that happens: between blocks of `in` the accumulators wait in memory unrounded.
#include "linear/linear.h"

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "core/bits.h"
#include "core/cpu/memory.h"
#include "core/cpu/simd.h"
#include "linear/cpu/fast.h"
#include "linear/cpu/parallel.h"
#include "linear/cpu/unpacked.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace specbranch {
namespace cpu {
namespace SPECBRANCH_ISA {
namespace {

constexpr int lanes = simd_width;
constexpr int64_t step = 2 * lanes;  // elements of `in` that two vectors hold
constexpr int max_group = 6;         // rows that share one read of a weight
constexpr int64_t max_rows = 192;    // rows per pass over the weights: bounds the scratch memory
constexpr int64_t cache_line = 64;   // bytes

// Outputs computed together with `rows` rows: 8 to 12 accumulators keep the multiply-add units busy, and with the
// operands they fit the 16 registers of AVX2.
constexpr int tile_outputs(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : rows == 3 ? 4 : rows == 4 ? 3 : 2; }

// sum += a * b: the same instruction in every tile of a level, never left to the compiler's choice. In x86's other two
// forms of it, which GCC likes to mix in, accumulators change registers, and tiles that fit the registers spill.
inline void add_product(FloatVec& sum, FloatVec a, FloatVec b) {
#if defined(__AVX2__)
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#elif defined(__aarch64__)
  sum = (FloatVec)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
  sum += a * b;
#endif
}

// `step` consecutive elements of a row as two float32 vectors, in an order that is the same for inputs and weights:
// bfloat16 gives its even elements, then its odd ones, because a shift or a mask widens a whole register.
template <int half, typename T>
inline FloatVec load_half(const T* p) {
  return load(p + half * lanes);
}
template <int half>
inline FloatVec load_half(const Bfloat16* p) {
  const UintVec words = load_unaligned<UintVec>(p);
  return (FloatVec)(half == 0 ? words << 16 : words & 0xFFFF0000u);
}

// The lanes' sum: the upper half is added to the lower one until one lane is left.
inline float sum_lanes(FloatVec v) {
  float lane[lanes];
  store_unaligned(lane, v);
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

template <int half, typename T, int rows, int outputs>
inline void accumulate_half(FloatVec (&a)[rows][outputs], const float* x, const T* w, int64_t w_stride) {
  FloatVec v[outputs];
#pragma GCC unroll 8
  for (int o = 0; o < outputs; ++o) v[o] = load_half<half>(w + o * w_stride);
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    const FloatVec u = load(x + (half * rows + r) * lanes);
#pragma GCC unroll 8
    for (int o = 0; o < outputs; ++o) add_product(a[r][o], u, v[o]);
  }
}

// acc[r][o] += x[r] . w[o] over `steps` steps; x is [steps, 2, rows, lanes]. Meanwhile the weights at `next` are
// fetched for the following call. Not inlined, so that every tile has all registers to itself.
template <typename T, int rows, int outputs>
__attribute__((noinline)) void accumulate(float* acc, const float* x, const T* w, int64_t w_stride, int64_t steps,
                                          const T* next) {
  FloatVec a[rows][outputs];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int o = 0; o < outputs; ++o) a[r][o] = load(acc + (r * outputs + o) * lanes);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 8
    for (int o = 0; o < outputs; ++o) __builtin_prefetch(next + o * w_stride);
    next += step;
    accumulate_half<0>(a, x, w, w_stride);
    // Loads for each half of their own: kept ones would cost the tile of 6 rows registers that it lacks.
    asm volatile("" : "+r"(w));
    accumulate_half<1>(a, x, w, w_stride);
    x += 2 * rows * lanes;
    w += step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int o = 0; o < outputs; ++o) store_unaligned(acc + (r * outputs + o) * lanes, a[r][o]);
}

template <typename T>
struct Problem {
  const T* input;
  const T* weight;
  const T* bias;
  T* output;
  int64_t rows, in, out, w_stride, y_stride;
  int64_t x_stride;      // floats of a widened row
  int64_t block;         // elements of `in` per block, a multiple of step
  int64_t panel;         // outputs per unit of work
  const float* widened;  // the groups of rows one after the other, each as accumulate reads it
};

// Row r of a group of `rows` rows, into the layout that accumulate reads.
template <typename T>
void widen_row(const T* from, int64_t in, float* group, int64_t rows, int64_t r) {
  auto put = [&](int64_t s, const T* p) {
    float* to = group + (s * 2 * rows + r) * lanes;
    store_unaligned(to, load_half<0>(p));
    store_unaligned(to + rows * lanes, load_half<1>(p));
  };
  const int64_t whole = in / step;
  for (int64_t s = 0; s < whole; ++s) put(s, from + s * step);
  if (whole * step < in) {
    T padded[step] = {};
    memcpy(padded, from + whole * step, (in - whole * step) * sizeof(T));
    put(whole, padded);
  }
}

// A tile: `rows` rows from `row` on, `outputs` outputs from `o` on, the elements [begin, end) of `in`.
template <typename T, int rows, int outputs>
void tile(const Problem<T>& p, float* acc, int64_t row, int64_t o, int64_t begin, int64_t end, const T* next) {
  const float* x = p.widened + row * p.x_stride + begin * rows;
  const T* w = p.weight + o * p.w_stride + begin;
  const int64_t whole = (end - begin) / step, tail = end - begin - whole * step;
  accumulate<T, rows, outputs>(acc, x, w, p.w_stride, whole, next);
  if (tail > 0) {
    T padded[outputs * step] = {};
    for (int i = 0; i < outputs; ++i) memcpy(padded + i * step, w + i * p.w_stride + whole * step, tail * sizeof(T));
    accumulate<T, rows, outputs>(acc, x + whole * step * rows, padded, step, 1, padded);
  }
}

template <typename T, int rows, int outputs>
void finish(const Problem<T>& p, const float* acc, int64_t row, int64_t o) {
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < outputs; ++i) {
      float y = sum_lanes(load(acc + (r * outputs + i) * lanes));
      if (p.bias != nullptr) y += to_float(p.bias[o + i]);
      store(p.output + (row + r) * p.y_stride + o + i, y);
    }
  }
}

// Calls body(outputs as a type, o) for the tiles of the outputs [o, end); what does not fill a tile goes one by one.
template <int rows, typename Body>
void for_tiles(int64_t o, int64_t end, const Body& body) {
  constexpr int outputs = tile_outputs(rows);
  for (; o + outputs <= end; o += outputs) body(std::integral_constant<int, outputs>(), o);
  for (; o < end; ++o) body(std::integral_constant<int, 1>(), o);
}

// Calls body(rows as a type) for a number of rows known at run time.
template <int rows = max_group, typename Body>
void with_rows(int64_t count, const Body& body) {
  if constexpr (rows > 1) {
    if (count < rows) return with_rows<rows - 1>(count, body);
  }
  body(std::integral_constant<int, rows>());
}

// The outputs [o_begin, o_end) of all rows. `acc` holds rows * (o_end - o_begin) vectors; `following` is the output
// at which this thread will go on.
template <typename T>
void panel(const Problem<T>& p, float* acc, int64_t o_begin, int64_t o_end, int64_t following) {
  const int64_t width = o_end - o_begin;
  const int64_t groups = divide_up(p.rows, max_group);
  std::fill(acc, acc + p.rows * width * lanes, 0.0f);
  for (int64_t begin = 0; begin < p.in; begin += p.block) {
    const int64_t end = std::min(begin + p.block, p.in);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t row = p.rows * g / groups;
      with_rows(p.rows * (g + 1) / groups - row, [&](auto rows) {
        for_tiles<rows>(o_begin, o_end, [&](auto outputs, int64_t o) {
          // What the next tile reads: the next outputs, or this panel's next block of `in`, or the next panel.
          int64_t next_output = o + outputs, next_begin = begin;
          if (next_output >= o_end) {
            next_output = o_begin;
            if (g + 1 == groups) next_begin = end;
            if (next_begin == p.in) {
              next_output = following;
              next_begin = 0;
            }
          }
          const T* next = p.weight + std::min(next_output, p.out - outputs) * p.w_stride + next_begin;
          tile<T, rows, outputs>(p, acc + (row * width + (o - o_begin) * rows) * lanes, row, o, begin, end, next);
        });
      });
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t row = p.rows * g / groups;
    with_rows(p.rows * (g + 1) / groups - row, [&](auto rows) {
      for_tiles<rows>(o_begin, o_end, [&](auto outputs, int64_t o) {
        finish<T, rows, outputs>(p, acc + (row * width + (o - o_begin) * rows) * lanes, row, o);
      });
    });
  }
}

template <typename T>
void product(Problem<T> p, int threads) {
  thread_local Buffer<float> scratch;
  threads = threads_for(p.rows, p.in, p.out, threads);
  p.x_stride = divide_up(p.in, step) * step;
  // Long panels read memory in long runs; short ones keep the accumulators of many rows in the second-level cache,
  // and the threads busy to the end.
  const int64_t longest = p.rows > 2 * max_group ? 64 : 128;
  p.panel = std::min(longest, divide_up(divide_up(p.out, 2 * threads), 8) * 8);
  // Up to 18 KB of widened inputs for 6 rows: they stay in the first-level cache while a panel's weights pass by.
  const int64_t blocks = p.rows <= 2 || p.in == 0 ? 1 : divide_up(p.in, 768);
  p.block = divide_up(divide_up(p.in, blocks), step) * step;
  threads = static_cast<int>(std::min<int64_t>(threads, divide_up(p.out, p.panel)));
  const int64_t acc_size = p.rows * p.panel * lanes;
  float* const widened = scratch.at_least(p.rows * p.x_stride + threads * acc_size);
  p.widened = widened;
  std::atomic<int64_t> next_panel{0}, next_acc{0};

  const int64_t groups = divide_up(p.rows, max_group);
#pragma omp parallel for schedule(static) num_threads(threads) if (p.rows * p.in > 65536)
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t row = p.rows * g / groups, end = p.rows * (g + 1) / groups;
    for (int64_t r = row; r < end; ++r) {
      widen_row(p.input + r * p.in, p.in, widened + row * p.x_stride, end - row, r - row);
    }
  }

#pragma omp parallel num_threads(threads)
  {
    float* const acc = widened + p.rows * p.x_stride + next_acc++ * acc_size;
    // Panels are handed out one by one, since the draft may be running on one of the cores, and one ahead, since a
    // thread fetches the first weights of its next panel during the last tile of the one at hand.
    int64_t o = next_panel++ * p.panel;
    while (o < p.out) {
      const int64_t following = next_panel++ * p.panel;
      panel(p, acc, o, std::min(o + p.panel, p.out), following < p.out ? following : o);
      o = following;
    }
  }
}

// All rows, in passes of at most max_rows.
template <typename T>
void run(const Problem<T>& whole, int threads) {
  const int64_t passes = whole.out == 0 ? 0 : divide_up(whole.rows, max_rows);
  for (int64_t i = 0; i < passes; ++i) {
    Problem<T> p = whole;
    const int64_t begin = whole.rows * i / passes;
    p.rows = whole.rows * (i + 1) / passes - begin;
    p.input += begin * p.in;
    p.output += begin * p.y_stride;
    product(p, threads);
  }
}

template <typename T>
void run(const LinearParams& params) {
  const Tensor& w = params.weight;
  Problem<T> p{};
  p.input = params.input.as<const T>();
  p.weight = w.as<const T>();
  p.bias = params.bias.as<const T>();
  p.output = params.output.as<T>();
  p.rows = rows_of(params.input);
  p.in = w.shape[1];
  p.out = p.y_stride = w.shape[0];
  p.w_stride = w.stride[0];
  run(p, params.launch.threads);
}

}  // namespace

void linear(const LinearParams& p) {
  switch (p.input.dtype) {
    case Dtype::bfloat16: return run<Bfloat16>(p);
    case Dtype::float16: return run<Float16>(p);
    default: return run<float>(p);
  }
}

void packed_linear(const PackedLinearParams& params) {
  if (params.weight.arithmetic == Arithmetic::fast) return fast(params);
  for_unpacked(params, [&](const Bfloat16* weights, int64_t stride, int64_t begin, int64_t count) {
    Problem<Bfloat16> p{};
    p.input = params.input.as<const Bfloat16>();
    p.weight = weights;
    p.bias = params.bias.data == nullptr ? nullptr : params.bias.as<const Bfloat16>() + begin;
    p.output = params.output.as<Bfloat16>() + begin;
    p.rows = rows_of(params.input);
    p.in = params.weight.in;
    p.out = count;
    p.w_stride = stride;
    p.y_stride = params.weight.out;
    run(p, 1);
  });
}

}  // namespace SPECBRANCH_ISA
}  // namespace cpu
}  // namespace specbranch

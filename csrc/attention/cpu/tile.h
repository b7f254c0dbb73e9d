// One tile of attention: 64 keys against a block of query rows. A row is one query head of one node; all rows of
// a call that share a KV head share the packed tile, so K and V are read and widened once.
//
// A row's arithmetic depends neither on the rows beside it nor on where tiles begin: every score is one chain of
// multiply-adds over the head dimension, the sum and every output element one chain over the visible keys, and a
// masked key leaves them as they are. The maximum that keeps weights small is rounded up to an integer (in units of
// log2), so that a new one rescales what was summed before by a power of two: exactly.
#pragma once

#include <cmath>

#include "attention/cpu/simd.h"

namespace specbranch::cpu::SPECBRANCH_ISA {

constexpr int tile_keys = 64;     // one word of ancestor bits
constexpr int panel = 2 * lanes;  // columns of a register block
constexpr int block_rows = 6;     // rows of a register block: 6 x 2 sums, 2 columns and a splat fill 16 registers

// Keys [count, D] become panels [64 / panel][D][panel] with the keys along the vector; missing keys are zeros.
template <typename T>
void pack_keys(const T* keys, int64_t row_stride, int count, int64_t dim, const T* zeros, float* packed) {
  for (int first = 0; first < tile_keys; first += lanes) {
    const T* rows[lanes];
    for (int i = 0; i < lanes; ++i) rows[i] = first + i < count ? keys + (first + i) * row_stride : zeros;
    float* out = packed + first / panel * panel * dim + first % panel;
    int64_t d = 0;
    for (; d + 4 <= dim; d += 4) {
      FloatVec columns[4];
      load_transposed(rows, d, columns);
      for (int j = 0; j < 4; ++j) store(out + (d + j) * panel, columns[j]);
    }
    for (; d < dim; ++d) {
      for (int i = 0; i < lanes; ++i) out[d * panel + i] = to_float(rows[i][d]);
    }
  }
}

// Values [count, Dv] become float32 [count, width]; the columns past Dv are zeros.
template <typename T>
void widen_values(const T* values, int64_t row_stride, int count, int64_t dim, int64_t width, float* out) {
  for (int t = 0; t < count; ++t, values += row_stride, out += width) {
    int64_t d = 0;
    for (; d + lanes <= dim; d += lanes) store(out + d, load(values + d));
    for (; d < dim; ++d) out[d] = to_float(values[d]);
    for (; d < width; ++d) out[d] = 0.0f;
  }
}

inline bool all_finite(const float* values, int64_t row_stride, int count, int64_t width) {
  IntVec bad{};
  for (int t = 0; t < count; ++t, values += row_stride) {
    for (int64_t d = 0; d < width; d += lanes) {
      const FloatVec v = load(values + d);
      bad |= v - v != FloatVec{};  // infinity and NaN give NaN
    }
  }
  return !any(bad);
}

// scores[r][t] = query[r] . key[t]; query is [D][Rows].
template <int Rows>
void score_block(const float* query, const float* packed, int64_t dim, float* scores) {
  for (int first = 0; first < tile_keys; first += panel, packed += panel * dim) {
    FloatVec sums[Rows][2] = {};
    for (int64_t d = 0; d < dim; ++d) {
      const FloatVec k0 = load(packed + d * panel), k1 = load(packed + d * panel + lanes);
      for (int r = 0; r < Rows; ++r) {
        const FloatVec q = broadcast(query[d * Rows + r]);
        sums[r][0] = multiply_add(q, k0, sums[r][0]);
        sums[r][1] = multiply_add(q, k1, sums[r][1]);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      store(scores + r * tile_keys + first, sums[r][0]);
      store(scores + r * tile_keys + first + lanes, sums[r][1]);
    }
  }
}

// output[r] = output[r] * rescale[r] + weights[r] . values.
template <int Rows>
void value_block(const float* weights, const float* rescale, const float* values, int64_t row_stride, int count,
                 int64_t width, float* output) {
  for (int64_t first = 0; first < width; first += panel) {
    FloatVec sums[Rows][2];
    for (int r = 0; r < Rows; ++r) {
      sums[r][0] = load(output + r * width + first) * rescale[r];
      sums[r][1] = load(output + r * width + first + lanes) * rescale[r];
    }
    const float* v = values + first;
    for (int t = 0; t < count; ++t, v += row_stride) {
      const FloatVec v0 = load(v), v1 = load(v + lanes);
      for (int r = 0; r < Rows; ++r) {
        const FloatVec weight = broadcast(weights[r * tile_keys + t]);
        sums[r][0] = multiply_add(weight, v0, sums[r][0]);
        sums[r][1] = multiply_add(weight, v1, sums[r][1]);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      store(output + r * width + first, sums[r][0]);
      store(output + r * width + first + lanes, sums[r][1]);
    }
  }
}

// The same for one row where masked values may be infinite or NaN: 0 * NaN is not 0, so they are left out.
inline void value_row_masked(const float* weights, float rescale, uint64_t visible, const float* values,
                             int64_t row_stride, int64_t width, float* output) {
  for (int64_t d = 0; d < width; d += lanes) {
    FloatVec sum = load(output + d) * rescale;
    for (uint64_t left = visible; left != 0; left &= left - 1) {
      const int t = __builtin_ctzll(left);
      sum = multiply_add(broadcast(weights[t]), load(values + t * row_stride + d), sum);
    }
    store(output + d, sum);
  }
}

// sums[r] = sums[r] * rescale[r] + all weights of the row, one after the other.
template <int Rows>
void sum_block(const float* weights, const float* rescale, int count, float* sums) {
  float total[Rows];
  for (int r = 0; r < Rows; ++r) total[r] = sums[r] * rescale[r];
  for (int t = 0; t < count; ++t) {
    for (int r = 0; r < Rows; ++r) total[r] += weights[r * tile_keys + t];
  }
  for (int r = 0; r < Rows; ++r) sums[r] = total[r];
}

inline FloatVec mask(FloatVec scores, uint64_t visible, int first) {
  IntVec bit;
  for (int i = 0; i < lanes; ++i) bit[i] = 1 << i;
  const IntVec hit = (IntVec{} + static_cast<int32_t>(visible >> first & ((uint64_t{1} << lanes) - 1))) & bit;
  return select(hit != 0, scores, broadcast(-INFINITY));
}

constexpr float exact_limit = 0x1p21f;  // beyond it (never in a sane model) integers and fractions do not separate

// Products become weights 2^(product * factor - maximum); returns the factor for what was summed before. (A query that
// was scaled before its products might overflow where they do not.)
inline float softmax_row(float* scores, uint64_t visible, float factor, const SoftCap& softcap, float* maximum) {
  FloatVec s[tile_keys / lanes];
  FloatVec top = broadcast(-INFINITY);
  for (int i = 0; i < tile_keys / lanes; ++i) {
    s[i] = load(scores + i * lanes) * factor;
    if (softcap.cap > 0.0f) s[i] = soft_capped(s[i], softcap);
    if (visible != ~uint64_t{0}) s[i] = mask(s[i], visible, i * lanes);
    top = max(s[i], top);  // a NaN is passed over here and spoils the sum below
  }
  const float new_maximum = std::ceil(reduce_max(max(top, broadcast(*maximum))));

  // While nothing finite has been seen, -inf - -inf would be NaN.
  const float base = new_maximum == -INFINITY ? 0.0f : new_maximum;
  const float rescale = new_maximum == *maximum ? 1.0f : exp2_nonpositive(*maximum - base);
  const bool exact = base > -exact_limit && base < exact_limit;
  for (int i = 0; i < tile_keys / lanes; ++i) {
    store(scores + i * lanes, exact ? exp2_below(s[i], base) : exp2_nonpositive(s[i] - base));
  }
  *maximum = new_maximum;
  return rescale;
}

}  // namespace specbranch::cpu::SPECBRANCH_ISA

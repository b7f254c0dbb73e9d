// One row after the other, and of a row one head after the other: every head is read once and written once.
#include "attention/rotary_commit.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "core/cpu/elements.h"

namespace specbranch::cpu::SPECBRANCH_ISA {
namespace {

constexpr int64_t min_parallel_bytes = 1 << 19;  // below it, waking threads costs more than the work

template <typename T>
float sum_of_squares(const T* x, int64_t dim) {
  constexpr int vectors = head_partial_sums / simd_width;
  FloatVec partial[vectors] = {};
  for (int64_t at = 0; at < dim; at += head_partial_sums) {
    for (int i = 0; i < vectors && at + i * simd_width < dim; ++i) {
      const FloatVec v = load_up_to(x + at + i * simd_width, dim - at - i * simd_width);
      partial[i] += v * v;
    }
  }
  float sums[head_partial_sums];
  std::memcpy(sums, partial, sizeof sums);
  for (int half = head_partial_sums / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

// The elements of a head, after the norm where there is one.
template <typename T>
class Head {
 public:
  Head(const T* x, const Tensor* norm, const RotaryCommitParams& p) : x_(x) {
    if (norm == nullptr) return;
    const int64_t dim = p.query.shape[2];
    const float mean = sum_of_squares(x, dim) / static_cast<float>(dim);
    weight_ = norm->as<const T>();
    factor_ = 1.0f / std::sqrt(mean + static_cast<float>(p.eps));
    unit_offset_ = p.unit_offset;
    round_first_ = p.round_first;
  }

  bool normed() const { return weight_ != nullptr; }
  const T* data() const { return x_; }

  // `count` elements, at most a vector's, from `at` on.
  FloatVec load(int64_t at, int64_t count) const {
    const FloatVec x = load_up_to(x_ + at, count);
    if (weight_ == nullptr) return x;
    const FloatVec scaled = x * factor_, weight = load_up_to(weight_ + at, count);
    return round_to<T>((unit_offset_ ? weight + 1.0f : weight) * (round_first_ ? round_to<T>(scaled) : scaled));
  }

 private:
  const T* x_;
  const T* weight_ = nullptr;
  float factor_ = 1.0f;
  bool unit_offset_ = false, round_first_ = false;
};

// What torch rounds between its operations: to the tensors' type, and not at all where a table of float32 makes it go on
// in float32.
template <typename T, typename Table>
FloatVec step(FloatVec v) {
  if constexpr (std::is_same_v<T, Table>) return round_to<T>(v);
  return v;
}

template <typename T, typename Table>
void rotate_halves(const Head<T>& head, const Table* cos, const Table* sin, int64_t half, T* to) {
  for (int64_t i = 0; i < half; i += simd_width) {
    const int64_t count = half - i, j = i + half;
    const FloatVec first = head.load(i, count), second = head.load(j, count);
    const auto times = [count](FloatVec x, const Table* table) { return step<T, Table>(x * load_up_to(table, count)); };
    store_up_to(to + i, times(first, cos + i) - times(second, sin + i), count);
    store_up_to(to + j, times(second, cos + j) + times(first, sin + j), count);
  }
}

template <typename T, typename Table>
void rotate_pairs(const Head<T>& head, const Table* cos, const Table* sin, int64_t rotary_dim, T* to) {
  const WideVec minus_first = broadcast(uint64_t{0x80000000u});  // the sign of the first of each pair
  for (int64_t i = 0; i < rotary_dim; i += simd_width) {
    const int64_t count = rotary_dim - i;
    const FloatVec x = head.load(i, count);
    const FloatVec other = (FloatVec)(((WideVec)x << 32 | (WideVec)x >> 32) ^ minus_first);
    const FloatVec along = step<T, Table>(x * load_up_to(cos + i, count));
    store_up_to(to + i, along + step<T, Table>(other * load_up_to(sin + i, count)), count);
  }
}

template <typename T, typename Table>
void embed(const Head<T>& head, const Table* cos, const Table* sin, const RotaryCommitParams& p, T* to) {
  const int64_t dim = p.query.shape[2], rotary_dim = p.cos.shape[1];
  if (p.interleaved) {
    rotate_pairs(head, cos, sin, rotary_dim, to);
  } else {
    rotate_halves(head, cos, sin, rotary_dim / 2, to);
  }
  if (!head.normed()) {
    std::memcpy(to + rotary_dim, head.data() + rotary_dim, static_cast<size_t>(dim - rotary_dim) * sizeof(T));
    return;
  }
  for (int64_t i = rotary_dim; i < dim; i += simd_width) store_up_to(to + i, head.load(i, dim - i), dim - i);
}

template <typename T, typename Table>
void commit_row(const RotaryCommitParams& p, int64_t i) {
  const int64_t row = p.rows.as<const int64_t>()[i];
  const Table* cos = p.cos.as<const Table>() + i * p.cos.stride[0];
  const Table* sin = p.sin.as<const Table>() + i * p.sin.stride[0];
  const auto from = [i](const Tensor& t, int64_t head) {
    return t.as<const T>() + i * t.stride[0] + head * t.stride[1];
  };
  const auto place = [row](const Tensor& t, int64_t head) {
    return t.as<T>() + head * t.stride[0] + row * t.stride[1];
  };
  const int64_t query_heads = p.query.shape[1], kv_heads = p.key.shape[1], dim = p.query.shape[2];
  const Tensor* query_norm = p.normed ? &p.query_norm : nullptr;
  const Tensor* key_norm = p.normed ? &p.key_norm : nullptr;
  T* output = p.output.as<T>() + i * query_heads * dim;
  for (int64_t head = 0; head < query_heads; ++head) {
    embed(Head<T>(from(p.query, head), query_norm, p), cos, sin, p, output + head * dim);
  }
  for (int64_t head = 0; head < kv_heads; ++head) {
    embed(Head<T>(from(p.key, head), key_norm, p), cos, sin, p, place(p.keys, head));
  }
  const size_t value_bytes = static_cast<size_t>(p.value.shape[2]) * sizeof(T);
  for (int64_t head = 0; head < kv_heads && value_bytes > 0; ++head) {
    std::memcpy(place(p.values, head), from(p.value, head), value_bytes);
  }
}

template <typename T, typename Table>
void commit(const RotaryCommitParams& p) {
  const int64_t n = p.query.shape[0], dim = p.query.shape[2];
  const int64_t items = p.query.shape[1] * dim + p.key.shape[1] * (dim + p.value.shape[2]);  // of a row
  const int64_t bytes = 2 * n * items * static_cast<int64_t>(sizeof(T));                     // read and written
  // All threads or one: another team size would make OpenMP end threads and start them again for the next op.
  const int threads = bytes < min_parallel_bytes ? 1 : std::max(p.launch.threads, 1);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) commit_row<T, Table>(p, i);
}

template <typename T>
void commit_with_tables(const RotaryCommitParams& p) {
  if (p.cos.dtype == Dtype::float32) return commit<T, float>(p);
  commit<T, T>(p);
}

}  // namespace

void rotary_commit(const RotaryCommitParams& p) {
  switch (p.query.dtype) {
    case Dtype::bfloat16: return commit_with_tables<Bfloat16>(p);
    case Dtype::float16: return commit_with_tables<Float16>(p);
    default: return commit<float, float>(p);
  }
}

}  // namespace specbranch::cpu::SPECBRANCH_ISA

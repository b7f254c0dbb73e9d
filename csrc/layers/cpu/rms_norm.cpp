// A row at a time, which stays in the first cache between its two passes.
#include "layers/rms_norm.h"

#include <algorithm>
#include <cmath>

#include "core/cpu/elements.h"

namespace specbranch::cpu::SPECBRANCH_ISA {
namespace {

constexpr int64_t min_parallel_elements = 1 << 16;  // below it, waking threads costs more than the work

// The partial sums of a row that can have elements, a power of two and whole vectors of them.
int64_t used_partial_sums(int64_t size) {
  int64_t used = simd_width;
  while (used < size && used < partial_sums) used *= 2;
  return used;
}

class SquareSum {
 public:
  explicit SquareSum(int64_t used) : used_(used) {
    for (int64_t j = 0; j < used; j += simd_width) store(partial_ + j, FloatVec{});
  }

  // Of the elements at + 0, at + 1, ...
  void add(int64_t at, FloatVec x) {
    float* sums = partial_ + at % partial_sums;
    store(sums, load(sums) + x * x);
  }

  float total() {
    int64_t half = used_ / 2;
    for (; half >= simd_width; half /= 2) {
      for (int64_t j = 0; j < half; j += simd_width)
        store(partial_ + j, load(partial_ + j) + load(partial_ + j + half));
    }
    for (; half > 0; half /= 2) {
      for (int64_t j = 0; j < half; ++j) partial_[j] += partial_[j + half];
    }
    return partial_[0];
  }

 private:
  int64_t used_;
  alignas(64) float partial_[partial_sums];
};

template <typename T>
struct Row {
  const T* input;
  const T* residual;  // null where there is none
  T* sum;
  T* output;
};

// f(at, load, store) for the vectors of a row, with what loads and stores as many elements as there are.
template <typename F>
inline void for_each_vector(int64_t size, F f) {
  int64_t at = 0;
  for (; at + simd_width <= size; at += simd_width) {
    f(at, [](const auto* p) { return load(p); }, [](auto* p, FloatVec x) { store(p, x); });
  }
  const int64_t left = size - at;
  if (left == 0) return;
  f(at, [left](const auto* p) { return load_some(p, left); }, [left](auto* p, FloatVec x) { store_some(p, x, left); });
}

template <typename T>
void norm_row(const RmsNormParams& p, const Row<T>& row, int64_t size, int64_t used) {
  SquareSum squares(used);
  const T* normed = row.residual != nullptr ? row.sum : row.input;
  if (row.residual != nullptr) {
    for_each_vector(size, [&](int64_t at, auto load, auto store) {
      const FloatVec x = round_to<T>(load(row.residual + at) + load(row.input + at));
      store(row.sum + at, x);
      squares.add(at, x);
    });
  } else {
    for_each_vector(size, [&](int64_t at, auto load, auto) { squares.add(at, load(row.input + at)); });
  }
  const float mean = squares.total() / static_cast<float>(size);
  const FloatVec scale = broadcast(1.0f / std::sqrt(mean + static_cast<float>(p.eps)));
  const T* weight = p.weight.as<const T>();
  const bool unit_offset = p.unit_offset, round_first = p.round_first;
  for_each_vector(size, [&](int64_t at, auto load, auto store) {
    const FloatVec scaled = load(normed + at) * scale, w = load(weight + at);
    const FloatVec x = round_first ? round_to<T>(scaled) : scaled;
    store(row.output + at, x * (unit_offset ? w + broadcast(1.0f) : w));
  });
}

template <typename T>
void norm_rows(const RmsNormParams& p, int64_t rows, int64_t size) {
  const int64_t used = used_partial_sums(size);
  // All threads or one: another team size would make OpenMP end threads and start them again for the next op.
  const int threads = rows * size < min_parallel_elements ? 1 : std::max(p.launch.threads, 1);
  const auto norm = [&](int64_t i) {
    const int64_t at = i * size;
    const T* residual = p.has_residual ? p.residual.as<const T>() + at : nullptr;
    T* sum = p.has_residual ? p.sum.as<T>() + at : nullptr;
    norm_row<T>(p, {p.input.as<const T>() + at, residual, sum, p.output.as<T>() + at}, size, used);
  };
  if (threads == 1) {  // no call of OpenMP at all
    for (int64_t i = 0; i < rows; ++i) norm(i);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) norm(i);
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  const int64_t size = p.input.shape[p.input.dims - 1];
  int64_t rows = 1;
  for (int i = 0; i + 1 < p.input.dims; ++i) rows *= p.input.shape[i];
  if (rows == 0 || size == 0) return;
  switch (p.input.dtype) {
    case Dtype::float32: return norm_rows<float>(p, rows, size);
    case Dtype::bfloat16: return norm_rows<Bfloat16>(p, rows, size);
    default: return norm_rows<Float16>(p, rows, size);
  }
}

}  // namespace specbranch::cpu::SPECBRANCH_ISA

// Rows of logits as the passes read them: as they are, or with -inf for the tokens that are not allowed. The one place
// on the CPU that knows the layout of `allowed`, see check_allowed.
#pragma once

#include <cmath>

#include "core/cpu/simd.h"
#include "core/tensor.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

template <typename T, bool masked>
struct LogitRow {
  static constexpr bool is_masked = masked;

  const T* logits = nullptr;
  const uint32_t* allowed = nullptr;

  LogitRow() = default;
  LogitRow(const Tensor& logits, const Tensor* allowed, int64_t row)
      : logits(logits.as<const T>() + row * logits.stride[0]),
        allowed(masked ? allowed->as<const uint32_t>() + row * allowed->stride[0] : nullptr) {}

  float operator[](int64_t t) const { return only_allowed(t, 1u) != 0 ? to_float(logits[t]) : -HUGE_VALF; }

  // Of the tokens from t + i on, where t is a multiple of 32: cheap where the compiler knows i.
  FloatVec vector(int64_t t, int i) const { return mask(t, i, raw(t + i)); }
  // Of the tokens from t on, a multiple of simd_width.
  FloatVec vector(int64_t t) const { return vector(t - t % 32, static_cast<int>(t % 32)); }
  // Whatever the mask says. For where the mask of what is found costs less: `mask` for x of the tokens from t + i on,
  // or only_allowed.
  FloatVec raw(int64_t t) const { return load(logits + t); }
  FloatVec mask(int64_t t, int i, FloatVec x) const {
    return masked ? select_bits(words(t)[i / 32], i % 32, x, broadcast(-HUGE_VALF)) : x;
  }

  // Those of `lanes`, tokens from t on, that are allowed. They must not go beyond a multiple of 32.
  uint32_t only_allowed(int64_t t, uint32_t lanes) const { return masked ? lanes & bits(t) : lanes; }
  // Whether none of the tokens from t on is allowed, `count` up to a multiple of 32.
  bool allows_none(int64_t t, int count) const { return masked && only_allowed(t, ~0u >> (32 - count)) == 0; }
  // Which tokens of a block are allowed: of the 64 from t on, a multiple of 64.
  uint64_t allowed_in_block(int64_t t) const {
    return masked ? static_cast<uint64_t>(words(t)[1]) << 32 | words(t)[0] : ~uint64_t{0};
  }

 private:
  const uint32_t* words(int64_t t) const { return allowed + static_cast<uint64_t>(t) / 32; }
  // That of token t and those behind it in its word, from the lowest bit up.
  uint32_t bits(int64_t t) const { return *words(t) >> (static_cast<uint64_t>(t) % 32); }
};
constexpr int block_tokens = 64;

// Calls body(t, i) for the vectors at t + i from `begin`, a multiple of 64, to `end`, but for blocks of which no token is
// allowed. Returns where the whole ones end.
template <typename Row, typename Body>
inline int64_t each_vector(const Row& row, int64_t begin, int64_t end, Body body) {
  int64_t t = begin;
  for (; Row::is_masked && t + block_tokens <= end; t += block_tokens) {
    if (row.allowed_in_block(t) == 0) continue;
#pragma GCC unroll 16
    for (int i = 0; i < block_tokens; i += simd_width) body(t, i);
  }
  for (; t + simd_width <= end; t += simd_width) {
    const int i = Row::is_masked ? static_cast<int>(t % 32) : 0;
    body(t - i, i);
  }
  return t;
}

// Calls body(LogitRow{}) with one of the type that rows of this dtype have.
template <typename Body>
auto with_row_type(Dtype dtype, bool masked, Body body) {
  const auto of = [&](auto element) {
    using T = decltype(element);
    return masked ? body(LogitRow<T, true>()) : body(LogitRow<T, false>());
  };
  switch (dtype) {
    case Dtype::bfloat16: return of(Bfloat16{});
    case Dtype::float16: return of(Float16{});
    default: return of(float{});
  }
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

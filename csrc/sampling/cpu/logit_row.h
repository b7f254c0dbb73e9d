// Rows of logits as the passes read them: as they are, or with -inf for the tokens that are not allowed. The one place
// on the CPU that knows the layout of `allowed`, see check_allowed.
#pragma once

#include <cmath>

#include "core/cpu/simd.h"
#include "core/tensor.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

// Places are tokens: those of vectors multiples of simd_width, those of blocks multiples of 64.
template <typename T, bool masked>
struct LogitRow {
  static constexpr int block = 64;

  const T* logits = nullptr;
  const uint32_t* allowed = nullptr;

  LogitRow() = default;
  explicit LogitRow(const T* logits) : logits(logits) {}
  LogitRow(const Tensor& logits, const Tensor* allowed, int64_t row)
      : logits(logits.as<const T>() + row * logits.stride[0]),
        allowed(masked ? allowed->as<const uint32_t>() + row * allowed->stride[0] : nullptr) {}

  float operator[](int64_t t) const { return !masked || (bits(t) & 1u) != 0 ? to_float(logits[t]) : -HUGE_VALF; }

  FloatVec vector(int64_t t) const {
    const FloatVec x = load(logits + t);
    return masked ? select_bits(bits(t), 0, x, broadcast(-HUGE_VALF)) : x;
  }
  // The vector at place `at` of a block. Cheap where `at` is known to the compiler.
  FloatVec vector(int64_t block_start, int at) const {
    const FloatVec x = load(logits + block_start + at);
    return masked ? select_bits(allowed[block_start / 32 + at / 32], at % 32, x, broadcast(-HUGE_VALF)) : x;
  }
  // Whether the vectors from t on, of at most 32 tokens that begin at a multiple of their number, are nothing but -inf
  // for the mask.
  bool skips(int64_t t, int count) const { return masked && (bits(t) & ~0u >> (32 - count)) == 0; }

  // Calls body(row) with the row to read a block from: without the mask where all its tokens are allowed. Not where
  // none is.
  template <typename Body>
  void read_block(int64_t block_start, Body body) const {
    if constexpr (masked) {
      const uint32_t first = allowed[block_start / 32], second = allowed[block_start / 32 + 1];
      if ((first | second) == 0) return;
      if ((first & second) != ~0u) return body(*this);
    }
    body(LogitRow<T, false>(logits));
  }

 private:
  // Those of token t and of the tokens behind it in its word, from the lowest bit up.
  uint32_t bits(int64_t t) const { return allowed[static_cast<uint64_t>(t) / 32] >> (static_cast<uint64_t>(t) % 32); }
};

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

// Rows of logits as the sampling kernels read them: in groups of four tokens, because one Philox block has the noise of
// four and 16 bytes hold as many float32 logits. Tokens that are not allowed have -inf: the one place of the kernels that
// knows the layout of `allowed`, see check_allowed.
#pragma once

#include <limits>

#include "core/cuda/device.h"
#include "sampling/filters.h"

namespace specbranch::cuda {

using Word64 = unsigned long long;  // what 64-bit atomics take

constexpr float infinity = std::numeric_limits<float>::infinity();

constexpr int group_tokens = 4;
struct Group {
  float x[group_tokens];
};

__device__ inline Group load_aligned(const float* p) {
  const float4 v = *reinterpret_cast<const float4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ inline Group load_aligned(const Bfloat16* p) {
  const uint2 v = *reinterpret_cast<const uint2*>(p);
  return {{__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xFFFF0000u), __uint_as_float(v.y << 16),
           __uint_as_float(v.y & 0xFFFF0000u)}};
}
__device__ inline Group load_aligned(const Float16* p) {
  const uint2 v = *reinterpret_cast<const uint2*>(p);
  const auto half = [](uint32_t bits) { return to_float(Float16{static_cast<uint16_t>(bits)}); };
  return {{half(v.x & 0xFFFFu), half(v.x >> 16), half(v.y & 0xFFFFu), half(v.y >> 16)}};
}

// Where the rows of `allowed` are, in 32-bit words; nowhere where all tokens are allowed.
struct AllowedRows {
  const uint32_t* first = nullptr;
  int64_t stride = 0;

  AllowedRows() = default;
  explicit AllowedRows(const Tensor& allowed) : first(allowed.as<const uint32_t>()), stride(allowed.stride[0]) {}
};
constexpr int word_groups = 32 / group_tokens;

// Tokens fit in 31 bits, so groups and tokens are counted in int32_t. masked: whether there are rows of `allowed`.
template <typename T, bool masked>
struct LogitRow {
  using Element = T;
  static constexpr bool is_masked = masked;

  const T* data;
  const uint32_t* words;
  int32_t vocabulary;
  bool aligned;

  __device__ LogitRow(const void* logits, int64_t stride, const AllowedRows& allowed, int64_t row, int32_t vocabulary)
      : data(static_cast<const T*>(logits) + row * stride),
        words(masked ? allowed.first + row * allowed.stride : nullptr),
        vocabulary(vocabulary),
        aligned(reinterpret_cast<uintptr_t>(data) % (group_tokens * sizeof(T)) == 0) {}

  __device__ int32_t groups() const { return (vocabulary - 1) / group_tokens + 1; }

  __device__ float operator[](int32_t token) const {
    const bool allows = !masked || (words[token / 32] >> (token % 32) & 1u) != 0;
    return allows ? to_float(data[token]) : -infinity;
  }

  // The logits of group g.
  __device__ Group group(int32_t g) const {
    Group group = load(data + group_tokens * static_cast<int64_t>(g), vocabulary - group_tokens * g, aligned);
    if (masked) allow(group, words[g / word_groups] >> group_tokens * (g % word_groups));
    return group;
  }

  // The lowest bits are those of the group's tokens.
  __device__ static void allow(Group& group, uint32_t bits) {
#pragma unroll
    for (int j = 0; j < group_tokens; ++j) group.x[j] = (bits >> j & 1u) != 0 ? group.x[j] : -infinity;
  }

  // Four logits from p on; -inf where fewer are left.
  __device__ static Group load(const T* p, int32_t left, bool aligned) {
    if (aligned && left >= group_tokens) return load_aligned(p);
    Group group;
#pragma unroll
    for (int j = 0; j < group_tokens; ++j) group.x[j] = j < left ? to_float(p[j]) : -infinity;
    return group;
  }
};

// Groups first, first + step, ... below `end` of a row, one for each call of next(); then -inf for ever.
template <typename Row, int step>
class GroupReader {
 public:
  __device__ GroupReader(const Row& row, int32_t first, int32_t end)
      : at_(row.data + group_tokens * static_cast<int64_t>(first)),
        words_(Row::is_masked ? row.words + first / word_groups : nullptr),
        first_bit_(group_tokens * (first % word_groups)),
        left_(0),
        aligned_(row.aligned) {
    static_assert(step % word_groups == 0, "the bits of a reader's groups have the same place in each word");
    if (first >= end) return;
    left_ = end < row.groups() ? group_tokens * (end - first) : row.vocabulary - group_tokens * first;
  }
  __device__ Group next() {
    Group group = Row::load(at_, left_, aligned_);
    if (Row::is_masked) {
      Row::allow(group, left_ > 0 ? *words_ >> first_bit_ : 0u);
      words_ += step / word_groups;
    }
    at_ += group_tokens * step;
    left_ -= min(left_, group_tokens * step);
    return group;
  }

 private:
  const typename Row::Element* at_;
  const uint32_t* words_;
  int first_bit_;
  int32_t left_;
  bool aligned_;
};

// ---- Integers in the order of floats.

// -0 becomes +0, as comparisons have it.
__device__ inline uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ (bits >> 31 != 0 ? 0xFFFFFFFFu : 0x80000000u);
}
__device__ inline float from_ordered(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 != 0 ? 0x80000000u : 0xFFFFFFFFu));
}

// A larger key is a larger score or, of equal ones, the lower token. No candidate has key 0.
__device__ inline Word64 candidate_key(float score, int32_t token) {
  return static_cast<Word64>(ordered(score)) << 32 | ~static_cast<uint32_t>(token);
}
__device__ inline float key_score(Word64 key) { return from_ordered(static_cast<uint32_t>(key >> 32)); }
__device__ inline int32_t key_token(Word64 key) { return static_cast<int32_t>(~static_cast<uint32_t>(key)); }

// ---- Warps.

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % warp_size; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / warp_size; }
// Lanes of `bits` before the calling one.
__device__ inline int rank_in(unsigned bits) { return __popc(bits & ((1u << lane_index()) - 1u)); }

template <typename V>
__device__ V warp_sum(V value) {
#pragma unroll
  for (int offset = warp_size / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(all_lanes, value, offset);
  return value;
}
template <typename V>
__device__ V warp_inclusive_sum(V value) {
#pragma unroll
  for (int offset = 1; offset < warp_size; offset *= 2) {
    const V before = __shfl_up_sync(all_lanes, value, offset);
    if (lane_index() >= offset) value += before;
  }
  return value;
}
__device__ inline Word64 larger(Word64 a, Word64 b) { return a > b ? a : b; }
__device__ inline Word64 warp_max(Word64 value) {
#pragma unroll
  for (int offset = warp_size / 2; offset > 0; offset /= 2) {
    value = larger(value, __shfl_xor_sync(all_lanes, value, offset));
  }
  return value;
}

}  // namespace specbranch::cuda

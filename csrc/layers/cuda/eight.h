// Eight elements of a row as a thread takes them: one or two loads of 16 bytes where all addresses allow that, else one
// by one.
#pragma once

#include "core/cuda/device.h"

namespace specbranch::cuda {

constexpr int eight = 8;

template <typename T>
struct alignas(16) Eight {
  T item[eight];
};

// Whether what starts at `data`, in steps of `stride` elements, allows it.
inline bool takes_vectors(const void* data, int64_t stride, int64_t item_bytes) {
  return (reinterpret_cast<uint64_t>(data) | static_cast<uint64_t>(stride * item_bytes)) % 16 == 0;
}

// The elements at + 0, at + 1, ... of a row of `size`; zeros behind its end. vectors: `size` is a multiple of eight.
template <bool vectors, typename T>
__device__ inline void load_eight(const T* row, int64_t at, int64_t size, float (&x)[eight]) {
  if constexpr (vectors) {
    const Eight<T> items = *reinterpret_cast<const Eight<T>*>(row + at);
#pragma unroll
    for (int e = 0; e < eight; ++e) x[e] = to_float(items.item[e]);
  } else {
#pragma unroll
    for (int e = 0; e < eight; ++e) x[e] = at + e < size ? to_float(row[at + e]) : 0.0f;
  }
}

template <bool vectors, typename T>
__device__ inline void store_eight(T* row, int64_t at, int64_t size, const float (&x)[eight]) {
  if constexpr (vectors) {
    Eight<T> items;
#pragma unroll
    for (int e = 0; e < eight; ++e) items.item[e] = from_float<T>(x[e]);
    *reinterpret_cast<Eight<T>*>(row + at) = items;
  } else {
#pragma unroll
    for (int e = 0; e < eight; ++e) {
      if (at + e < size) row[at + e] = from_float<T>(x[e]);
    }
  }
}

// As a T has it.
template <typename T>
__device__ inline float round_to(float x) {
  return to_float(from_float<T>(x));
}

}  // namespace specbranch::cuda

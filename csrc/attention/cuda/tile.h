// Tiles of queries, keys and values in shared memory, in chunks of 16 bytes. place(row, chunk) is a chunk's offset.
#pragma once

#include "attention/cuda/keys.h"

namespace specbranch::cuda {

// Copies rows [first, first + rows) of a head into shared memory, as far as they lie before `end`, or those that
// `cache_rows` names; the rest, and what lies behind `dim` in `used_chunks` chunks, becomes zeros. The vector copies
// are asynchronous.
template <typename T, int chunks, int rows, typename Place>
__device__ inline void load_tile(unsigned char* memory, SharedAddress address, const Place& place, const T* head,
                                 int64_t stride, int first, int end, const int* cache_rows, int dim, int used_chunks,
                                 bool vector) {
  constexpr int items = 16 / sizeof(T);
  const int thread = thread_again();
  if (vector) {
    constexpr int across = chunks & -chunks, down = attention_threads / across;
    const int row = thread / across;
#pragma unroll
    for (int j = 0; j < chunks; j += across) {
      const int chunk = thread % across + j;
      if (chunk >= used_chunks) continue;
      const bool in_dim = chunk * items < dim;
      if (cache_rows != nullptr) {
        const T* from = head + chunk * items;
#pragma unroll 4
        for (int i = 0; i < rows; i += down) {
          const int cache_row = cache_rows[row + i];
          cp_async_16(address + place(row + i, chunk), from + max(cache_row, 0) * stride, in_dim && cache_row >= 0);
        }
        continue;
      }
      const int present_rows = in_dim ? end - first : 0;
      const T* from = head + int64_t{first + row} * stride + chunk * items;
#pragma unroll
      for (int i = 0; i < rows; i += down, from += down * stride) {
        cp_async_16(address + place(row + i, chunk), from, row + i < present_rows);
      }
    }
    return;
  }
#pragma unroll 1
  for (int at = thread; at < rows * used_chunks * items; at += attention_threads) {
    const int row = at / (used_chunks * items), d = at % (used_chunks * items);
    const int cache_row = cache_rows != nullptr ? cache_rows[row] : first + row < end ? first + row : -1;
    T item = from_float<T>(0.0f);
    if (d < dim && cache_row >= 0) item = head[cache_row * stride + d];
    *reinterpret_cast<T*>(memory + place(row, d / items) + d % items * sizeof(T)) = item;
  }
}

// The same for the queries of a block: `count` rows from `first_row` on, of `rows` that there is room for.
template <typename T, int chunks, typename Place>
__device__ inline void load_queries(const AttentionArguments& a, int kv_head, int first_row, int count, int rows,
                                    unsigned char* memory, SharedAddress address, const Place& place, int used_chunks) {
  constexpr int items = 16 / sizeof(T);
  constexpr int across = chunks & -chunks, down = attention_threads / across;
  const int first = threadIdx.x / across, heads = a.heads_per_kv;
  int node = a.node(first_row + first), head = (first_row + first) % heads;  // division is slow: once is enough
#pragma unroll 1
  for (int row = first; row < rows; row += down) {
    const bool present = row < count;
    const T* from = static_cast<const T*>(a.query);
    if (present) from += node * a.query_stride[0] + (kv_head * heads + head) * a.query_stride[1];
    for (int chunk = threadIdx.x % across; chunk < used_chunks; chunk += across) {
      if (a.vector_query) {
        cp_async_16(address + place(row, chunk), from + chunk * items, present && chunk * items < a.dim);
        continue;
      }
      T* to = reinterpret_cast<T*>(memory + place(row, chunk));
      for (int i = 0; i < items; ++i) {
        to[i] = present && chunk * items + i < a.dim ? from[chunk * items + i] : from_float<T>(0.0f);
      }
    }
    node += down / heads;
    head += down % heads;
    if (head >= heads) {
      head -= heads;
      ++node;
    }
  }
}

template <typename T>
__device__ inline uint32_t without_nonfinite(uint32_t word) {
  if constexpr (sizeof(T) == 4) {
    return (word & 0x7F800000u) == 0x7F800000u ? 0 : word;
  } else {
    constexpr uint32_t exponent = std::is_same_v<T, Bfloat16> ? 0x7F80u : 0x7C00u;
    if ((word & exponent) == exponent) word &= 0xFFFF0000u;
    if ((word >> 16 & exponent) == exponent) word &= 0xFFFFu;
    return word;
  }
}

// A hidden key has the weight 0, and 0 times infinity or NaN is not 0: in a tile that not all rows see whole,
// infinities and NaN among the values are replaced by zeros, and add_nonfinite() brings them to the rows that see them.
// Returns whether the calling thread found any.
template <typename T, int chunks, int rows, typename Place>
__device__ inline bool clear_nonfinite(unsigned char* memory, const Place& place, int used_chunks) {
  bool found = false;
#pragma unroll 1
  for (int at = thread_again(); at < rows * chunks; at += attention_threads) {
    const int row = at / chunks, chunk = at % chunks;
    if (chunk >= used_chunks) continue;
    uint4* items = reinterpret_cast<uint4*>(memory + place(row, chunk));
    const uint4 old = *items;
    const uint4 clean = {without_nonfinite<T>(old.x), without_nonfinite<T>(old.y), without_nonfinite<T>(old.z),
                         without_nonfinite<T>(old.w)};
    if (clean.x == old.x && clean.y == old.y && clean.z == old.z && clean.w == old.w) continue;
    *items = clean;
    found = true;
  }
  return found;
}

}  // namespace specbranch::cuda

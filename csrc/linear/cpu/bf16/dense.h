// Weights as they lie in a checkpoint: bfloat16 [out, in], rows `stride` elements apart.
#pragma once

#include "core/bits.h"
#include "linear/cpu/bf16/ahead.h"
#include "linear/cpu/bf16/quads.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

struct Dense {
  const Bfloat16* weight;
  int64_t stride, out, in;

  // The blocks of the quad at output o and the elements from k on. What lies beyond the weight counts as 0.
  void read(int64_t o, int64_t k, Block (&blocks)[read_in / block_in]) const {
    if (__builtin_expect(o + quad <= out && k + read_in <= in, 1)) {
      read_rows(weight + o * stride + k, stride, blocks);
    } else {
      Bfloat16 edge[quad * read_in];
      copy_edge(o, k, edge);
      read_rows(edge, read_in, blocks);
    }
  }

  // Asks for what `read` will read. Any o and k: a prefetch never fails.
  __attribute__((always_inline)) void fetch(int64_t o, int64_t k) const {
    for (int i = 0; i < quad; ++i) __builtin_prefetch(weight + (o + i) * stride + k);
  }

  // The elements [k, k_end) of `outputs` outputs from o on.
  Ahead ahead(int64_t o, int64_t outputs, int64_t k, int64_t k_end) const {
    const int64_t row = static_cast<int64_t>(sizeof(Bfloat16)) * stride;
    return {reinterpret_cast<const char*>(weight + o * stride + k), row,
            divide_up(static_cast<int64_t>(sizeof(Bfloat16)) * (k_end - k), cache_line), outputs};
  }

 private:
  // Not inlined, and blocks never have an address: they stay in registers.
  __attribute__((noinline)) void copy_edge(int64_t o, int64_t k, Bfloat16* to) const {
    memset(to, 0, quad * read_in * sizeof(Bfloat16));
    const int64_t count = in - k < read_in ? in - k : read_in;
    for (int64_t i = 0; i < quad && o + i < out; ++i) {
      memcpy(to + i * read_in, weight + (o + i) * stride + k, static_cast<size_t>(count) * sizeof(Bfloat16));
    }
  }
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

// When the threads of a product pay, and how many rows it has.
#pragma once

#include <algorithm>

#include "core/isa.h"
#include "core/tensor.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

// Below this many multiply-adds one thread computes a product alone. A few rows count as `rows_of_a_step`, so that the
// size of the weights decides: from 512 Ki weights on all threads work.
//
// On a virtual machine with two EPYC cores (family 26) a thread that still spins joins in 0.4 us, one that sleeps in
// 45 us, and one whose core another program uses in 4 to 12 ms, a time slice. A tiny model's products take one thread
// 10 to 250 us each, so that there is little to gain and much to lose: the bundled pair with two threads was up to a
// fifth faster on idle cores, and 4 to 25 times slower beside other programs. A larger model's products may be no
// longer (896 x 896, one row: 30 us), but they stand between products that pay, and the threads go on spinning. At
// the threshold 16 rows of float32 take one thread about 150 us.
constexpr int64_t min_parallel_products = int64_t{1} << 23;
constexpr int64_t rows_of_a_step = 16;

inline int threads_for(int64_t rows, int64_t in, int64_t out, int threads) {
  const bool small = std::max(rows, rows_of_a_step) * in * out < min_parallel_products;
  return small ? 1 : std::max(threads, 1);
}

// Of a tensor [..., in].
inline int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int i = 0; i + 1 < t.dims; ++i) rows *= t.shape[i];
  return rows;
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

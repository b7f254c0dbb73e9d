// Which block of a launch ends last, so that it can finish the work of all (see specbranch_ext/ops/_tickets.py).
#pragma once

#include "core/cuda/device.h"

namespace specbranch::cuda {

// By one thread of each of `count` blocks, after what it, or its block before a barrier, wrote for the others: true in
// the last one, which after a barrier sees what all have written. The ticket is 0 before, and again after the last.
__device__ inline bool takes_last_ticket(unsigned* ticket, unsigned count) {
  __threadfence();
  const bool is_last = atomicAdd(ticket, 1u) == count - 1u;
  __threadfence();
  if (is_last) *ticket = 0;
  return is_last;
}

}  // namespace specbranch::cuda

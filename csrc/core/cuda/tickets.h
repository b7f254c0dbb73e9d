// Which block of a launch ends last, so that it can finish the work of all (see specbranch_ext/ops/_tickets.py).
#pragma once

#include "core/cuda/device.h"

namespace specbranch::cuda {

// Called by one thread of each of `count` blocks once the block's results are written (and, if other threads wrote
// them, behind a barrier). True in the block that comes last; behind a barrier it sees what all blocks have written.
// The ticket is 0 before, and 0 again after the last block.
__device__ inline bool takes_last_ticket(unsigned* ticket, unsigned count) {
  __threadfence();
  const bool is_last = atomicAdd(ticket, 1u) == count - 1u;
  __threadfence();
  if (is_last) *ticket = 0;
  return is_last;
}

}  // namespace specbranch::cuda

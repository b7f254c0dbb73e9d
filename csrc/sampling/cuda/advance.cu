// One block: there is little to do, and what other threads read can be written behind a barrier: the rows that padding
// copies, and the slot.
//
// A slot outside [0, S) cannot raise here: nothing is written.
#include "sampling/advance_row.h"

#include "core/cuda/device.h"

namespace specbranch::cuda {
namespace {

constexpr int threads = 128;

struct Results {
  int64_t* tokens;
  float* scores;
  float* confidence;
  float* entropy;
};

Results results(const DraftResults& tensors) {
  return {tensors.tokens.as<int64_t>(), tensors.scores.as<float>(), tensors.confidence.as<float>(),
          tensors.entropy.as<float>()};
}

// Without the 1, the compiler would rather spill than use more registers.
__global__ void __launch_bounds__(threads, 1)
    advance_kernel(const __grid_constant__ StepInputs step, int64_t n, const __grid_constant__ Results from,
                   const __grid_constant__ Results to, int64_t slots, int64_t most_rows, int64_t* slot_pointer) {
  const int64_t slot = *slot_pointer;
  if (slot < 0 || slot >= slots) return;
  const int64_t first_row = slot * most_rows, first = first_row * step.k;
  for (int64_t at = threadIdx.x; at < n * step.k; at += threads) {
    to.tokens[first + at] = from.tokens[at];
    to.scores[first + at] = from.scores[at];
    to.confidence[first + at] = from.confidence[at];
  }
  for (int64_t i = threadIdx.x; i < n; i += threads) to.entropy[first_row + i] = from.entropy[i];
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {
    for (int64_t i = threadIdx.x; i < n; i += threads) {
      const bool copies = i > 0 && is_padding(step, i);
      if (copies == (turn == 0)) advance_row(step, i);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *slot_pointer = slot + 1;
}

}  // namespace

void advance(const AdvanceParams& p) {
  launch("advance", advance_kernel, p.launch, dim3(1), dim3(threads), 0, step_inputs(p), p.ids.shape[0],
         results(p.sample), results(p.buffers), p.buffers.tokens.shape[0], p.buffers.tokens.shape[1],
         p.slot.as<int64_t>());
}

}  // namespace specbranch::cuda

// One row of advance, for the CPU and CUDA kernels.
#pragma once

#include "core/isa.h"
#include "sampling/advance.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

// The inputs of a step, and the tokens [n, k] that it gave.
struct StepInputs {
  const int64_t* tokens;
  int64_t k;
  int64_t* ids;
  int64_t* positions;
  int64_t* next_positions;
  int64_t* rows;
  const int64_t* strides;
  uint64_t* ancestors;
  int64_t words;
  const int64_t* prefix;
  int64_t prefix_stride;
  int64_t spare;
};

inline StepInputs step_inputs(const AdvanceParams& p) {
  return {p.sample.tokens.as<const int64_t>(),
          p.sample.tokens.shape[1],
          p.ids.as<int64_t>(),
          p.positions.as<int64_t>(),
          p.next_positions.as<int64_t>(),
          p.rows.as<int64_t>(),
          p.strides.as<const int64_t>(),
          p.ancestors.as<uint64_t>(),
          p.ancestors.shape[1],
          p.prefix.as<const int64_t>(),
          p.prefix.dims,  // 0 for one that is of all rows
          p.spare};
}

// Numbers from memory may be any: sums wrap.
SPECBRANCH_HD inline int64_t wrapping_sum(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}

SPECBRANCH_HD inline bool is_padding(const StepInputs& step, int64_t i) { return step.strides[i] <= 0; }

// The row that padding copies: the first one, or with several texts the one with a stride before it, which is of its own
// text.
SPECBRANCH_HD inline int64_t copied_by(const StepInputs& step, int64_t i) {
  if (step.prefix_stride == 0) return 0;
  while (i > 0 && is_padding(step, i)) --i;
  return i;
}

// Writes row i only. Padding reads another row, which therefore comes later. No word has the bit of a cache row beyond
// them.
SPECBRANCH_HD inline void advance_row(const StepInputs& step, int64_t i) {
  const bool real = !is_padding(step, i);
  const int64_t from = real ? i : copied_by(step, i);
  const int64_t stride = step.strides[from], next_row = wrapping_sum(step.rows[from], stride);
  const int64_t token = step.tokens[from * step.k], position = step.positions[from];
  const uint64_t bit = static_cast<uint64_t>(next_row) - static_cast<uint64_t>(step.prefix[from * step.prefix_stride]);
  for (int64_t w = 0; w < step.words; ++w) {
    const bool has_bit = stride > 0 && bit / 64 == static_cast<uint64_t>(w);
    step.ancestors[i * step.words + w] =
        step.ancestors[from * step.words + w] | (has_bit ? uint64_t{1} << bit % 64 : uint64_t{0});
  }
  step.ids[i] = token > 0 ? token : 0;
  step.positions[i] = wrapping_sum(position, 1);
  step.next_positions[i] = wrapping_sum(position, 2);
  step.rows[i] = real ? next_row : step.spare;
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

// Too little work for threads or vectors.
#include "sampling/advance.h"

#include <cstring>

#include "sampling/advance_row.h"

namespace specbranch::cpu::SPECBRANCH_ISA {
namespace {

// To row 0 and those behind it of the slot's.
void store(const Tensor& part, const Tensor& buffer, int64_t slot) {
  if (is_empty(part)) return;
  int64_t bytes = part.item_bytes;
  for (int i = 0; i < part.dims; ++i) bytes *= part.shape[i];
  std::memcpy(buffer.as<char>() + slot * buffer.stride[0] * buffer.item_bytes, part.data, bytes);
}

}  // namespace

void advance(const AdvanceParams& p) {
  int64_t* slot = p.slot.as<int64_t>();
  store(p.sample.tokens, p.buffers.tokens, *slot);
  store(p.sample.scores, p.buffers.scores, *slot);
  store(p.sample.confidence, p.buffers.confidence, *slot);
  store(p.sample.entropy, p.buffers.entropy, *slot);
  const StepInputs step = step_inputs(p);
  for (int64_t i = p.ids.shape[0] - 1; i >= 0; --i) advance_row(step, i);  // what padding copies lies before it
  ++*slot;
}

}  // namespace specbranch::cpu::SPECBRANCH_ISA

// advance's checks and the choice of its kernel.
#include "sampling/advance.h"

#include "core/dispatch.h"

namespace specbranch {
namespace {

void check_column(const Tensor& t, int64_t n) {
  check_shape(t, {n}, "[n]");
  check_dtype(t, Dtype::int64);
  check_contiguous(t);
}

void check_number(const Tensor& t) {
  if (t.dims != 0) fail(std::string(t.name) + ": expected shape [], got " + shape_text(t));
  check_dtype(t, Dtype::int64);
}

void check_dtypes(const DraftResults& results) {
  check_dtype(results.tokens, Dtype::int64);
  for (const Tensor* t : {&results.scores, &results.confidence, &results.entropy}) check_dtype(*t, Dtype::float32);
  for (const Tensor* t : {&results.tokens, &results.scores, &results.confidence, &results.entropy}) {
    check_contiguous(*t);
  }
}

}  // namespace

void check_advance(const AdvanceParams& p) {
  const DraftResults &sample = p.sample, &buffers = p.buffers;
  check_shape(sample.tokens, {-1, -1}, "[n, k]");
  const int64_t n = sample.tokens.shape[0], k = sample.tokens.shape[1];
  if (k == 0) fail("sample[0]: expected at least one candidate, got shape " + shape_text(sample.tokens));
  for (const Tensor* t : {&sample.scores, &sample.confidence}) check_shape(*t, {n, k}, "[n, k]");
  check_shape(sample.entropy, {n}, "[n]");
  check_dtypes(sample);

  check_shape(buffers.tokens, {-1, -1, k}, "[S, R, k]");
  const int64_t slots = buffers.tokens.shape[0], most_rows = buffers.tokens.shape[1];
  if (most_rows < n) {
    fail("buffers[0]: expected at least n = " + std::to_string(n) + " rows, got shape " + shape_text(buffers.tokens));
  }
  for (const Tensor* t : {&buffers.scores, &buffers.confidence}) check_shape(*t, {slots, most_rows, k}, "[S, R, k]");
  check_shape(buffers.entropy, {slots, most_rows}, "[S, R]");
  check_dtypes(buffers);

  for (const Tensor* t : {&p.ids, &p.positions, &p.next_positions, &p.rows, &p.strides}) check_column(*t, n);
  check_shape(p.ancestors, {n, -1}, "[n, words]");
  check_dtype(p.ancestors, Dtype::int64);
  check_contiguous(p.ancestors);
  if (p.prefix.dims != 0 && (p.prefix.dims != 1 || p.prefix.shape[0] != n)) {
    fail("prefix: expected shape [] or [n] = [" + std::to_string(n) + "], got " + shape_text(p.prefix));
  }
  check_dtype(p.prefix, Dtype::int64);
  check_contiguous(p.prefix);
  check_number(p.slot);
  if (p.launch.on_cuda()) return;  // the kernel writes nothing
  const int64_t slot = *p.slot.as<const int64_t>();
  if (slot < 0 || slot >= slots) {
    fail("slot: expected one of the " + std::to_string(slots) + " of buffers[0], got " + std::to_string(slot));
  }
}

SPECBRANCH_DISPATCH(advance, AdvanceParams)

}  // namespace specbranch

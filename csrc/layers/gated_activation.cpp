// gated_activation's checks and the choice of its kernel.
#include "layers/gated_activation.h"

#include "core/dispatch.h"
#include "layers/rows.h"

namespace specbranch {
namespace {

Rows checked_rows(const Tensor& t) {
  if (t.dims < 1) fail(std::string(t.name) + ": expected shape [..., I], got []");
  check_last_dim_contiguous(t);
  const Rows rows = rows_of(t);
  int64_t inner = 1;  // rows of the dimensions behind
  for (int i = t.dims - 2; i >= 0 && !is_empty(t); --i) {
    if (t.shape[i] > 1 && t.stride[i] != rows.stride * inner) {
      fail(std::string(t.name) + ": expected rows with one stride, got stride " + std::to_string(t.stride[i]) +
           " in dimension " + std::to_string(i));
    }
    inner *= t.shape[i];
  }
  return rows;
}

}  // namespace

Activation activation_named(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  fail("activation: expected silu or gelu_tanh, got " + name);
}

void check_gated_activation(const GatedActivationParams& p) {
  check_float(p.gate);
  const Rows gate = checked_rows(p.gate);
  if (p.joined && gate.size % 2 != 0) fail("gate: expected shape [..., 2 I], got " + shape_text(p.gate));
  const int64_t size = p.joined ? gate.size / 2 : gate.size;
  const auto check_rows = [&](const Tensor& t) {
    check_dtype(t, p.gate.dtype);
    const Rows rows = checked_rows(t);
    if (rows.count != gate.count || rows.size != size) {
      fail(std::string(t.name) + ": expected " + std::to_string(gate.count) + " rows of " + std::to_string(size) +
           " elements, got shape " + shape_text(t));
    }
  };
  if (!p.joined) check_rows(p.up);
  check_rows(p.output);
  check_contiguous(p.output);
}

SPECBRANCH_DISPATCH(gated_activation, GatedActivationParams)

}  // namespace specbranch

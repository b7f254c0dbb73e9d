// Pieces of rows, on one thread or on all of them.
#include "layers/gated_activation.h"

#include <algorithm>

#include "core/bits.h"
#include "core/cpu/elements.h"
#include "layers/rows.h"

namespace specbranch::cpu::SPECBRANCH_ISA {
namespace {

constexpr int64_t min_parallel_elements = 1 << 15;  // below it, waking threads costs more than the work
constexpr int64_t piece = 2048;                     // elements

template <Activation activation, typename T>
inline FloatVec gated(FloatVec gate, FloatVec up) {
  return round_to<T>(activated<activation>(gate)) * up;
}

template <Activation activation, typename T>
void gate_elements(const T* gate, const T* up, T* output, int64_t count) {
  int64_t i = 0;
  for (; i + simd_width <= count; i += simd_width) {
    store(output + i, gated<activation, T>(load(gate + i), load(up + i)));
  }
  const int64_t left = count - i;
  if (left == 0) return;
  store_some(output + i, gated<activation, T>(load_some(gate + i, left), load_some(up + i, left)), left);
}

template <Activation activation, typename T>
void gate_rows(const GatedActivationParams& p) {
  const Rows gate = rows_of(p.gate), output = rows_of(p.output);
  const int64_t size = output.size, pieces = divide_up(size, piece);
  if (output.count * size == 0) return;
  const T* gates = p.gate.as<const T>();
  const T* ups = p.joined ? gates + size : p.up.as<const T>();
  const int64_t up_stride = p.joined ? gate.stride : rows_of(p.up).stride;
  // All threads or one: another team size would make OpenMP end threads and start them again for the next op.
  const int threads = output.count * size < min_parallel_elements ? 1 : std::max(p.launch.threads, 1);
  if (threads == 1) {  // no call of OpenMP at all
    for (int64_t row = 0; row < output.count; ++row) {
      gate_elements<activation>(gates + row * gate.stride, ups + row * up_stride, p.output.as<T>() + row * size, size);
    }
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < output.count * pieces; ++i) {
    const int64_t row = i / pieces, at = i % pieces * piece;
    gate_elements<activation>(gates + row * gate.stride + at, ups + row * up_stride + at,
                              p.output.as<T>() + row * size + at, std::min(piece, size - at));
  }
}

template <Activation activation>
void gate_tensors(const GatedActivationParams& p) {
  switch (p.gate.dtype) {
    case Dtype::float32: return gate_rows<activation, float>(p);
    case Dtype::bfloat16: return gate_rows<activation, Bfloat16>(p);
    default: return gate_rows<activation, Float16>(p);
  }
}

}  // namespace

void gated_activation(const GatedActivationParams& p) {
  if (p.activation == Activation::silu) return gate_tensors<Activation::silu>(p);
  gate_tensors<Activation::gelu_tanh>(p);
}

}  // namespace specbranch::cpu::SPECBRANCH_ISA

// One thread for eight neighbouring elements of a row at a time. Lower bound: the bytes of both inputs and of the
// output once, and an exponential and a quotient for each element.
#include "layers/gated_activation.h"

#include "layers/cuda/eight.h"
#include "layers/rows.h"

namespace specbranch::cuda {
namespace {

constexpr int threads = 256;

template <typename T>
struct Arguments {
  const T *gate, *up;
  T* output;
  int64_t gate_stride, up_stride, size;
  uint32_t row_eights, all_eights;
};

template <typename T, Activation activation, bool vectors>
__global__ void __launch_bounds__(threads) gated_activation_kernel(const __grid_constant__ Arguments<T> a) {
  // In 64 bits: the last step may lead beyond 2^32.
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * threads + threadIdx.x; i < a.all_eights;
       i += static_cast<uint64_t>(gridDim.x) * threads) {
    const uint32_t row = static_cast<uint32_t>(i) / a.row_eights;
    const int64_t at = int64_t{static_cast<uint32_t>(i) - row * a.row_eights} * eight;
    float gate[eight], up[eight];
    load_eight<vectors>(a.gate + row * a.gate_stride, at, a.size, gate);
    load_eight<vectors>(a.up + row * a.up_stride, at, a.size, up);
#pragma unroll
    for (int e = 0; e < eight; ++e) gate[e] = round_to<T>(activated<activation>(gate[e])) * up[e];
    store_eight<vectors>(a.output + row * a.size, at, a.size, gate);
  }
}

template <Activation activation, typename T>
void gate_rows(const GatedActivationParams& p) {
  const Rows gate = rows_of(p.gate), output = rows_of(p.output);
  const int64_t size = output.size, row_eights = divide_up(size, eight), all_eights = output.count * row_eights;
  if (all_eights == 0) return;
  if (all_eights > UINT32_MAX) fail("gate: expected at most 2^35 elements, got shape " + shape_text(p.gate));
  const T* gates = p.gate.as<const T>();
  const Arguments<T> a{gates,
                       p.joined ? gates + size : p.up.as<const T>(),
                       p.output.as<T>(),
                       gate.stride,
                       p.joined ? gate.stride : rows_of(p.up).stride,
                       size,
                       static_cast<uint32_t>(row_eights),
                       static_cast<uint32_t>(all_eights)};
  const bool vectors = size % eight == 0 && takes_vectors(a.gate, output.count > 1 ? a.gate_stride : 0, sizeof(T)) &&
                       takes_vectors(a.up, output.count > 1 ? a.up_stride : 0, sizeof(T)) &&
                       takes_vectors(a.output, size, sizeof(T));
  const int64_t blocks = divide_up(all_eights, threads), most_blocks = 132 * 8;  // what an H100 runs at once
  launch("gated_activation",
         vectors ? gated_activation_kernel<T, activation, true> : gated_activation_kernel<T, activation, false>,
         p.launch, dim3(static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks)), dim3(threads), 0, a);
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

}  // namespace specbranch::cuda

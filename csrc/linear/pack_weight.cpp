// On the CPU.
#include "linear/pack_weight.h"

#include <algorithm>
#include <vector>

#include "linear/lossless.h"

namespace specbranch {
namespace {

void check_weight(const Tensor& weight) {
  check_dtype(weight, Dtype::bfloat16);
  check_shape(weight, {-1, -1}, "[out, in]");
  check_last_dim_contiguous(weight);
  if (weight.device != cpu_device) fail("weight: expected a tensor on the CPU");
}

// Calls body(output, line, the weights there, how many) for all runs of outputs [begin, end).
template <typename Body>
void for_runs(const Tensor& weight, int64_t begin, int64_t end, const Body& body) {
  const int64_t in = weight.shape[1];
  for (int64_t output = begin; output < end; ++output) {
    const Bfloat16* const row = weight.as<const Bfloat16>() + output * weight.stride[0];
    for (int64_t k = 0; k < in; k += Lossless::run) {
      body(output, k / Lossless::run, row + k, std::min<int64_t>(Lossless::run, in - k));
    }
  }
}

// Raw runs of every quad.
std::vector<int64_t> raw_runs(const Tensor& weight, [[maybe_unused]] int threads) {
  const Lossless layout{weight.shape[0], weight.shape[1]};
  std::vector<int64_t> raw(layout.quads());
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t quad = 0; quad < layout.quads(); ++quad) {
    const int64_t begin = quad * Lossless::quad_outputs;
    for_runs(weight, begin, std::min(begin + Lossless::quad_outputs, layout.out),
             [&](int64_t, int64_t, const Bfloat16* weights, int64_t count) {
               raw[quad] += Lossless::top_of(weights, count) == Lossless::raw_top;
             });
  }
  return raw;
}

}  // namespace

int64_t packed_bytes(const Tensor& weight, WeightFormat format, int threads) {
  check_weight(weight);
  if (format != WeightFormat::lossless) fail("format: expected lossless: other formats round, see quantize_weight");
  int64_t raw = 0;
  for (const int64_t count : raw_runs(weight, threads)) raw += count;
  return Lossless{weight.shape[0], weight.shape[1]}.raw_offset() + raw * Lossless::raw_bytes;
}

void check_pack_weight(const PackWeightParams& p) {
  check_weight(p.weight);
  check_packed(p.packed);
}

void run_pack_weight(const PackWeightParams& p) {
  const Lossless layout{p.packed.out, p.packed.in};
  uint8_t* const data = p.packed.data.as<uint8_t>();
  [[maybe_unused]] const int threads = std::max(p.launch.threads, 1);
  const std::vector<int64_t> counts = raw_runs(p.weight, threads);
  std::vector<int64_t> first(counts.size());
  int64_t raw = 0;
  for (size_t quad = 0; quad < counts.size(); raw += counts[quad++]) first[quad] = raw;
  if (p.packed.data.shape[0] < layout.raw_offset() + raw * Lossless::raw_bytes) {
    fail("packed: expected as many bytes as packed_bytes says, got " + std::to_string(p.packed.data.shape[0]));
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t quad = 0; quad < layout.quads(); ++quad) {
    memset(data + quad * layout.quad_bytes(), 0, static_cast<size_t>(layout.quad_bytes()));
    const int64_t begin = quad * Lossless::quad_outputs;
    int64_t next = first[quad];
    for_runs(p.weight, begin, std::min(begin + Lossless::quad_outputs, layout.out),
             [&](int64_t output, int64_t line, const Bfloat16* weights, int64_t count) {
               next += layout.encode(data, output, line, weights, count, next);
             });
  }
}

}  // namespace specbranch

// Packing and unpacking, on the CPU: done once a load, and for the few rows of an embedding.
#include "linear/pack_weight.h"

#include <algorithm>
#include <vector>

#include "linear/lossless.h"

namespace specbranch {
namespace {

Lossless layout_of(const PackedWeight& packed) { return {packed.out, packed.in}; }

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

WeightFormat weight_format(const std::string& name) {
  if (name == "lossless") return WeightFormat::lossless;
  fail("format: expected lossless, got " + name);
}

void check_packed(const PackedWeight& weight) {
  check_dtype(weight.data, Dtype::uint8);
  check_shape(weight.data, {-1}, "[bytes]");
  check_contiguous(weight.data);
  if (weight.data.device != cpu_device) fail("packed: expected a tensor on the CPU");
  if (weight.out < 0 || weight.in < 0) fail("packed: expected a shape of two sizes of at least 0");
  const int64_t least = layout_of(weight).raw_offset();
  if (weight.data.shape[0] < least) {
    fail("packed: expected at least " + std::to_string(least) + " bytes for [" + std::to_string(weight.out) + ", " +
         std::to_string(weight.in) + "], got " + std::to_string(weight.data.shape[0]));
  }
  if (reinterpret_cast<uintptr_t>(weight.data.data) % 64 != 0) fail("packed: expected memory aligned to 64 bytes");
}

int64_t packed_bytes(const Tensor& weight, WeightFormat, int threads) {
  check_weight(weight);
  int64_t raw = 0;
  for (const int64_t count : raw_runs(weight, threads)) raw += count;
  return Lossless{weight.shape[0], weight.shape[1]}.raw_offset() + raw * Lossless::raw_bytes;
}

void check_pack_weight(const PackWeightParams& p) {
  check_weight(p.weight);
  check_packed(p.packed);
}

void run_pack_weight(const PackWeightParams& p) {
  const Lossless layout = layout_of(p.packed);
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

void check_unpack_rows(const UnpackRowsParams& p) {
  check_packed(p.packed);
  check_dtype(p.rows, Dtype::int64);
  check_shape(p.rows, {-1}, "[n]");
  check_contiguous(p.rows);
  check_dtype(p.output, Dtype::bfloat16);
  check_shape(p.output, {p.rows.shape[0], p.packed.in}, "[n, in]");
  check_contiguous(p.output);
  for (int64_t i = 0; i < p.rows.shape[0]; ++i) {
    const int64_t row = p.rows.as<const int64_t>()[i];
    if (row < 0 || row >= p.packed.out) {
      fail("rows: expected numbers from 0 to " + std::to_string(p.packed.out - 1) + ", got " + std::to_string(row));
    }
  }
}

void run_unpack_rows(const UnpackRowsParams& p) {
  const Lossless layout = layout_of(p.packed);
  const uint8_t* const data = p.packed.data.as<const uint8_t>();
  const bool small = p.output.shape[0] * p.packed.in < (int64_t{1} << 18);
  [[maybe_unused]] const int threads = small ? 1 : std::max(p.launch.threads, 1);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < p.rows.shape[0]; ++i) {
    Bfloat16* const to = p.output.as<Bfloat16>() + i * p.packed.in;
    for (int64_t k = 0; k < p.packed.in; k += Lossless::run) {
      Bfloat16 weights[Lossless::run];
      layout.decode(data, p.rows.as<const int64_t>()[i], k / Lossless::run, weights);
      const int64_t count = std::min<int64_t>(Lossless::run, p.packed.in - k);
      memcpy(to + k, weights, static_cast<size_t>(count) * sizeof(Bfloat16));
    }
  }
}

}  // namespace specbranch

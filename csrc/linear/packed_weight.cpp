#include "linear/packed_weight.h"

#include "linear/lossless.h"
#include "linear/packed_blocks.h"

namespace specbranch {

WeightFormat weight_format(const std::string& name) {
  if (name == "lossless") return WeightFormat::lossless;
  if (name == "q8_0") return WeightFormat::q8_0;
  if (name == "q4_0") return WeightFormat::q4_0;
  if (name == "q4_1") return WeightFormat::q4_1;
  if (name == "q4_k") return WeightFormat::q4_k;
  if (name == "q5_0") return WeightFormat::q5_0;
  if (name == "q5_1") return WeightFormat::q5_1;
  if (name == "q5_k") return WeightFormat::q5_k;
  if (name == "q6_k") return WeightFormat::q6_k;
  fail("format: expected one of lossless, q8_0, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, got " + name);
}

Arithmetic arithmetic(const std::string& name) {
  if (name == "exact") return Arithmetic::exact;
  if (name == "fast") return Arithmetic::fast;
  fail("arithmetic: expected exact or fast, got " + name);
}

int64_t packed_rows_bytes(int64_t out, int64_t in, WeightFormat format, Arithmetic arithmetic) {
  if (format == WeightFormat::lossless) return Lossless{out, in}.raw_offset();
  int64_t bytes = 0;
  with_packed_blocks(format, arithmetic, out, in, [&](auto layout) { bytes = layout.bytes(); });
  return bytes;
}

int64_t packed_group(WeightFormat format) {
  return format == WeightFormat::lossless ? Lossless::quad_outputs : most_width;
}

void check_packed(const PackedWeight& weight) {
  check_dtype(weight.data, Dtype::uint8);
  check_shape(weight.data, {-1}, "[bytes]");
  check_contiguous(weight.data);
  if (weight.data.device != cpu_device) fail("packed: expected a tensor on the CPU");
  if (weight.out < 0 || weight.in < 0) fail("packed: expected a shape of two sizes of at least 0");
  if (weight.format == WeightFormat::lossless) {
    if (weight.arithmetic != Arithmetic::exact) fail("arithmetic: expected exact for lossless weights, got fast");
  } else if (const int64_t whole = block_format(weight.format).weights; weight.in % whole != 0) {
    fail("packed: expected a multiple of " + std::to_string(whole) + " weights in a row, got " +
         std::to_string(weight.in));
  }
  const int64_t least = packed_rows_bytes(weight.out, weight.in, weight.format, weight.arithmetic);
  if (weight.data.shape[0] < least) {
    fail("packed: expected at least " + std::to_string(least) + " bytes for [" + std::to_string(weight.out) + ", " +
         std::to_string(weight.in) + "], got " + std::to_string(weight.data.shape[0]));
  }
  if (reinterpret_cast<uintptr_t>(weight.data.data) % 64 != 0) fail("packed: expected memory aligned to 64 bytes");
}

}  // namespace specbranch

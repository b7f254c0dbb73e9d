#include "linear/packed_weight.h"

#include "linear/lossless.h"

namespace specbranch {

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
  const int64_t least = Lossless{weight.out, weight.in}.raw_offset();
  if (weight.data.shape[0] < least) {
    fail("packed: expected at least " + std::to_string(least) + " bytes for [" + std::to_string(weight.out) + ", " +
         std::to_string(weight.in) + "], got " + std::to_string(weight.data.shape[0]));
  }
  if (reinterpret_cast<uintptr_t>(weight.data.data) % 64 != 0) fail("packed: expected memory aligned to 64 bytes");
}

}  // namespace specbranch

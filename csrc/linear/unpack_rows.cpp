// On the CPU: for the few rows of an embedding.
#include "linear/unpack_rows.h"

#include <algorithm>

#include "linear/lossless.h"
#include "linear/packed_blocks.h"

namespace specbranch {

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

namespace {

template <typename Layout>
void unpack(const UnpackRowsParams& p, const Layout& layout) {
  const uint8_t* const data = p.packed.data.as<const uint8_t>();
  const bool small = p.output.shape[0] * p.packed.in < (int64_t{1} << 18);
  [[maybe_unused]] const int threads = small ? 1 : std::max(p.launch.threads, 1);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < p.rows.shape[0]; ++i) {
    Bfloat16* const to = p.output.as<Bfloat16>() + i * p.packed.in;
    for (int64_t k = 0; k < p.packed.in; k += Layout::run) {
      Bfloat16 weights[Layout::run];
      layout.decode(data, p.rows.as<const int64_t>()[i], k / Layout::run, weights);
      const int64_t count = std::min<int64_t>(Layout::run, p.packed.in - k);
      memcpy(to + k, weights, static_cast<size_t>(count) * sizeof(Bfloat16));
    }
  }
}

}  // namespace

void run_unpack_rows(const UnpackRowsParams& p) {
  if (p.packed.format == WeightFormat::lossless) return unpack(p, Lossless{p.packed.out, p.packed.in});
  with_packed_blocks(p.packed, [&](auto layout) { unpack(p, layout); });
}

}  // namespace specbranch

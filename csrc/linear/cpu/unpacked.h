// Products over packed weights where no kernel reads them: some rows at a time are unpacked for the dense one.
#pragma once

#include <atomic>

#include "core/cpu/memory.h"
#include "linear/cpu/parallel.h"
#include "linear/lossless.h"
#include "linear/packed_blocks.h"
#include "linear/packed_linear.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

constexpr int64_t unpacked_outputs = 64;

// Calls body(weights [outputs, stride], stride, first output, outputs) for all outputs, on all threads that pay.
template <typename Layout, typename Body>
void for_unpacked(const PackedLinearParams& p, const Layout& layout, const Body& body) {
  const uint8_t* const data = p.weight.data.as<const uint8_t>();
  const int64_t lines = divide_up(layout.in, Layout::run), stride = lines * Layout::run;
  const int64_t chunks = divide_up(layout.out, unpacked_outputs);
  const int threads = threads_for(rows_of(p.input), layout.in, layout.out, p.launch.threads);
  Buffer<Bfloat16> memory(threads * unpacked_outputs * stride);
  std::atomic<int64_t> next_chunk{0}, next_thread{0};
#pragma omp parallel num_threads(threads)
  {
    Bfloat16* const weights = memory.at(next_thread++ * unpacked_outputs * stride);
    for (int64_t chunk = next_chunk++; chunk < chunks; chunk = next_chunk++) {
      const int64_t begin = chunk * unpacked_outputs, count = std::min(unpacked_outputs, layout.out - begin);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t line = 0; line < lines; ++line) {
          layout.decode(data, begin + i, line, weights + i * stride + line * Layout::run);
        }
      }
      body(weights, stride, begin, count);
    }
  }
}

template <typename Body>
void for_unpacked(const PackedLinearParams& p, const Body& body) {
  if (p.weight.format == WeightFormat::lossless) return for_unpacked(p, Lossless{p.weight.out, p.weight.in}, body);
  with_packed_blocks(p.weight, [&](auto layout) { for_unpacked(p, layout, body); });
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

// Products over packed weights where no kernel multiplies by them as they lie: some outputs' are unpacked at a time, for
// the dense kernel.
#pragma once

#include <atomic>

#include "core/cpu/memory.h"
#include "linear/cpu/decode_blocks.h"
#include "linear/cpu/parallel.h"
#include "linear/lossless.h"
#include "linear/packed_linear.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

constexpr int64_t unpacked_bytes = 96 << 10;  // of a thread's weights: they stay in the second-level cache
constexpr int64_t fewest_unpacked = 16, most_unpacked = 64;  // outputs
constexpr int64_t few_rows = 16;  // with more of them, what the dense kernel makes of its inputs counts for more

class LosslessDecoder {
 public:
  static constexpr int outputs = 1;
  using Layout = Lossless;

  explicit LosslessDecoder(const Layout& layout) : layout_(layout) {}
  void operator()(const uint8_t* data, int64_t output, Bfloat16* to, int64_t) const {
    for (int64_t line = 0; line < divide_up(layout_.in, Layout::run); ++line) {
      layout_.decode(data, output, line, to + line * Layout::run);
    }
  }

 private:
  Layout layout_;
};

// Calls body(weights [outputs, stride], stride, first output, outputs) for all outputs, on all threads that pay.
template <typename Decoder, typename Body>
void for_unpacked(const PackedLinearParams& p, const Decoder& decode, const Body& body) {
  const int64_t out = p.weight.out, in = p.weight.in;
  const uint8_t* const data = p.weight.data.as<const uint8_t>();
  const int64_t stride = divide_up(in, Decoder::Layout::run) * Decoder::Layout::run;
  const int64_t fitting = unpacked_bytes / (std::max<int64_t>(in, 1) * int64_t{sizeof(Bfloat16)});
  const int64_t rows = rows_of(p.input), least = rows <= few_rows ? fewest_unpacked : most_unpacked;
  const int64_t chunk = std::clamp(fitting / fewest_unpacked * fewest_unpacked, least, most_unpacked);
  const int threads = threads_for(rows, in, out, p.launch.threads);
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    thread_local Buffer<Bfloat16> buffer;
    Bfloat16* const weights = buffer.at_least(chunk * stride);
    for (int64_t begin = next++ * chunk; begin < out; begin = next++ * chunk) {
      const int64_t count = std::min(chunk, out - begin);
      for (int64_t i = 0; i < count; i += Decoder::outputs) decode(data, begin + i, weights + i * stride, stride);
      body(weights, stride, begin, count);
    }
  }
}

template <typename Body>
void for_unpacked(const PackedLinearParams& p, const Body& body) {
  const int64_t out = p.weight.out, in = p.weight.in;
  if (p.weight.format == WeightFormat::lossless) return for_unpacked(p, LosslessDecoder({out, in}), body);
  with_block_format(p.weight.format, [&](auto format) { for_unpacked(p, BlockDecoder<format>({out, in}), body); });
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

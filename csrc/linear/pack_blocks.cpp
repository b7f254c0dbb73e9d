// On the CPU.
#include "linear/pack_blocks.h"

#include <algorithm>
#include <atomic>

#include "linear/packed_blocks.h"

namespace specbranch {
namespace {

Float16 half_at(const uint8_t* p) {
  Float16 half;
  memcpy(&half, p, sizeof half);
  return half;
}

bool is_finite(Float16 half) { return (half.bits & 0x7C00) != 0x7C00; }

Float16 minus(Float16 half) { return {static_cast<uint16_t>(half.bits ^ 0x8000)}; }

// 16 bytes of the first half's codes and the second's.
void read_four_bits(const uint8_t* from, Run& run) {
  for (int e = 0; e < run_size; ++e) run.codes[e] = from[e % half_run] >> (e / half_run * 4) & 15;
}

// A fifth bit of each.
void add_tops(const uint8_t* from, Run& run) {
  for (int e = 0; e < run_size; ++e) run.codes[e] |= static_cast<uint8_t>((from[e / 8] >> (e % 8) & 1) << 4);
}

// The 6 bits each of the scale and minimum of run r, of a block's 12 bytes.
void read_six_bits(const uint8_t* from, int64_t r, Run& run) {
  if (r < 4) {
    run.scale[0] = from[r] & 63;
    run.minimum = from[r + 4] & 63;
  } else {
    run.scale[0] = static_cast<uint8_t>((from[r + 4] & 15) | from[r - 4] >> 6 << 4);
    run.minimum = static_cast<uint8_t>(from[r + 4] >> 4 | from[r] >> 6 << 4);
  }
}

// Run r of a block.
template <WeightFormat format>
void read_run(const uint8_t* block, int64_t r, Run& run) {
  if constexpr (format == WeightFormat::q8_0) {
    run.d = half_at(block);
    for (int e = 0; e < 32; ++e) run.codes[e] = block[2 + e] ^ 128;
  } else if constexpr (format == WeightFormat::q4_0) {
    run.d = half_at(block);
    read_four_bits(block + 2, run);
  } else if constexpr (format == WeightFormat::q4_1) {
    run.d = half_at(block);
    run.dmin = minus(half_at(block + 2));
    read_four_bits(block + 4, run);
  } else if constexpr (format == WeightFormat::q5_0) {
    run.d = half_at(block);
    read_four_bits(block + 6, run);
    add_tops(block + 2, run);
  } else if constexpr (format == WeightFormat::q5_1) {
    run.d = half_at(block);
    run.dmin = minus(half_at(block + 2));
    read_four_bits(block + 8, run);
    add_tops(block + 4, run);
  } else if constexpr (format == WeightFormat::q4_k || format == WeightFormat::q5_k) {
    run.d = half_at(block);
    run.dmin = half_at(block + 2);
    read_six_bits(block + 4, r, run);
    constexpr bool five = format == WeightFormat::q5_k;
    const uint8_t* const tops = block + 16;
    const uint8_t* const codes = block + (five ? 48 : 16) + r / 2 * 32;
    for (int e = 0; e < 32; ++e) {
      const int top = five ? tops[e] >> r & 1 : 0;
      run.codes[e] = static_cast<uint8_t>((codes[e] >> (r % 2 * 4) & 15) | top << 4);
    }
  } else {
    run.d = half_at(block + 208);
    for (int h = 0; h < 2; ++h) run.scale[h] = block[192 + 2 * r + h];
    const uint8_t* const codes = block + r / 4 * 64 + r % 2 * 32;
    const uint8_t* const tops = block + 128 + r / 4 * 32;
    for (int e = 0; e < 32; ++e) {
      run.codes[e] = static_cast<uint8_t>((codes[e] >> (r % 4 / 2 * 4) & 15) | (tops[e] >> (r % 4 * 2) & 3) << 4);
    }
  }
}

template <WeightFormat format, int width>
void pack(const PackBlocksParams& p, const PackedBlocks<format, width>& layout) {
  uint8_t* const data = p.packed.data.as<uint8_t>();
  [[maybe_unused]] const int threads = std::max(p.launch.threads, 1);
  std::atomic<int64_t> bad{-1};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t group = 0; group < layout.groups(); ++group) {
    memset(data + group * layout.group_bytes(), 0, static_cast<size_t>(layout.group_bytes()));
    const int64_t begin = group * layout.width, end = std::min(begin + layout.width, layout.out);
    for (int64_t output = begin; output < end; ++output) {
      const uint8_t* const row = p.blocks.as<const uint8_t>() + output * p.blocks.stride[0];
      for (int64_t number = 0; number < layout.runs(); ++number) {
        Run run{};
        read_run<format>(row + number / layout.block_runs * layout.format.bytes, number % layout.block_runs, run);
        if (!is_finite(run.d) || !is_finite(run.dmin)) bad = output;
        layout.put(data, output, number, run);
      }
    }
  }
  if (bad >= 0) fail("blocks: expected finite scales, row " + std::to_string(bad) + " has another");
}

}  // namespace

int64_t weights_of_blocks(int64_t row_bytes, WeightFormat format) {
  if (format == WeightFormat::lossless) fail("format: expected one of blocks, got lossless");
  const BlockFormat blocks = block_format(format);
  if (row_bytes % blocks.bytes != 0) {
    fail("blocks: expected rows of a multiple of " + std::to_string(blocks.bytes) + " bytes, got " +
         std::to_string(row_bytes));
  }
  return row_bytes / blocks.bytes * blocks.weights;
}

void check_pack_blocks(const PackBlocksParams& p) {
  check_dtype(p.blocks, Dtype::uint8);
  check_shape(p.blocks, {p.packed.out, -1}, "[out, bytes of a row]");
  check_last_dim_contiguous(p.blocks);
  if (p.blocks.device != cpu_device) fail("blocks: expected a tensor on the CPU");
  weights_of_blocks(p.blocks.shape[1], p.packed.format);
  check_packed(p.packed);
}

void run_pack_blocks(const PackBlocksParams& p) {
  with_packed_blocks(p.packed, [&](auto layout) { pack(p, layout); });
}

}  // namespace specbranch

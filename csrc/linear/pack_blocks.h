// Packing the blocks of a GGUF file's weight, once a load.
#pragma once

#include "linear/packed_weight.h"

namespace specbranch {

// Weights in a row of so many bytes. Throws std::invalid_argument where these are no whole blocks.
int64_t weights_of_blocks(int64_t row_bytes, WeightFormat format);

struct PackBlocksParams {
  Launch launch;
  Tensor blocks;        // uint8 [out, bytes of a row], last dimension contiguous
  PackedWeight packed;  // of packed_rows_bytes bytes, written
};

void check_pack_blocks(const PackBlocksParams& params);

// Throws std::invalid_argument for a scale that is not finite.
void run_pack_blocks(const PackBlocksParams& params);

}  // namespace specbranch

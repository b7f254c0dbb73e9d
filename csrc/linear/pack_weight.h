// Packed weights: how a checkpoint's weights are kept in fewer bytes. pack_weight writes one, unpack_rows reads some of
// its rows back.
#pragma once

#include <string>

#include "core/tensor.h"

namespace specbranch {

enum class WeightFormat { lossless };  // linear/lossless.h

// Throws std::invalid_argument for a name that is none.
WeightFormat weight_format(const std::string& name);

struct PackedWeight {
  WeightFormat format = WeightFormat::lossless;
  int64_t out = 0, in = 0;
  Tensor data;  // uint8 [bytes], contiguous, aligned to 64 bytes
};

void check_packed(const PackedWeight& weight);

// Bytes that the weight takes in this format. weight: bfloat16 [out, in], last dimension contiguous.
int64_t packed_bytes(const Tensor& weight, WeightFormat format, int threads);

struct PackWeightParams {
  Launch launch;
  Tensor weight;        // bfloat16 [out, in], last dimension contiguous
  PackedWeight packed;  // of packed_bytes bytes, written
};

void check_pack_weight(const PackWeightParams& params);
void run_pack_weight(const PackWeightParams& params);

struct UnpackRowsParams {
  Launch launch;
  PackedWeight packed;
  Tensor rows;    // int64 [n], contiguous
  Tensor output;  // bfloat16 [n, in], contiguous, written
};

void check_unpack_rows(const UnpackRowsParams& params);
void run_unpack_rows(const UnpackRowsParams& params);

}  // namespace specbranch

// advance: what lies between two draft steps of a burst. A step's results go to the burst's buffers, and its inputs
// become those of the batch one token further, in place.
#pragma once

#include "core/tensor.h"

namespace specbranch {

// What draft_sample gives.
struct DraftResults {
  Tensor tokens;      // int64
  Tensor scores;      // float32
  Tensor confidence;  // float32
  Tensor entropy;     // float32, without the last dimension
};

struct AdvanceParams {
  Launch launch;
  DraftResults buffers;   // [S, R, k], of every step of the burst; [slot, :n] is written
  DraftResults sample;    // [n, k], of this step
  Tensor ids;             // int64 [n], written, as all below that are not said to be read only
  Tensor positions;       // int64 [n]
  Tensor next_positions;  // int64 [n]: positions + 1
  Tensor rows;            // int64 [n]: the cache row of each row's K/V
  Tensor strides;         // int64 [n], read only: how many cache rows further a row goes; 0 for padding
  Tensor ancestors;       // int64 [n, words]: bit j says that the row sees cache row prefix + j
  Tensor prefix;          // int64 [], or [n] for rows of several texts, read only
  Tensor slot;            // int64 []
  int64_t spare = 0;      // the cache row of padding
};

// Throws std::invalid_argument naming the tensor and what was expected.
void check_advance(const AdvanceParams& params);

// The parameters must have passed the check. Padding becomes a copy of the first row, or with a prefix for each row of
// the one with a stride before it. A cache row that ancestors has no
// bit for gets none: in the last step of a burst, whose next batch nobody runs, there may be no room for it.
void run_advance(const AdvanceParams& params);

}  // namespace specbranch

// decoder_layer: a whole layer on the CPU, x + attention(norm(x)) and then the same with the gated MLP, by the ops that it
// consists of. Beside weights that stream through the caches, what a caller in Python does between two ops takes as long
// as the small ones themselves, so it is one call.
#pragma once

#include "core/tensor.h"
#include "layers/activation.h"
#include "linear/packed_weight.h"

namespace specbranch {

// weight.data is null where there is none.
struct RmsNorm {
  Tensor weight;
  double eps = 0.0;
  bool unit_offset = false, round_first = false;
};

// packed.data.data is null for a weight as it is.
struct LinearLayer {
  Tensor weight;
  PackedWeight packed;
  Tensor bias;

  bool is_packed() const { return packed.data.data != nullptr; }
  int64_t out() const { return is_packed() ? packed.out : weight.shape[0]; }
};

// What stays from call to call.
struct DecoderLayer {
  RmsNorm before_attention, behind_attention, before_mlp, behind_mlp;  // those behind are optional
  RmsNorm query, key;                                                  // of every head; optional
  LinearLayer inputs[3];  // queries, keys and values; or the first one gives all three beside each other
  LinearLayer attention_output;
  LinearLayer gates[2];  // gate and up; or the first one gives both
  LinearLayer down;
  int input_count = 3, gate_count = 2;
  int64_t query_heads = 0, kv_heads = 0;
  bool interleaved = false;  // see rotary_commit
  double scale = 1.0, softcap = 0.0;
  Activation activation = Activation::silu;
};

struct DecoderLayerParams {
  Launch launch;
  const DecoderLayer* layer = nullptr;
  Tensor hidden;         // [n, H], contiguous; the dtype of all tensors of floats but cos and sin
  Tensor cos, sin;       // see rotary_commit, as rows, keys and values
  Tensor rows;           // int64 [n]
  Tensor keys, values;   // [Hkv, C, D]
  Tensor prefix_length;  // see tree_attention, as the next six
  bool chain = true;
  Tensor ancestors;
  bool ragged = false;
  Tensor starts, sequence;
  int64_t sliding_window = 0;
  Tensor output;  // [n, H], contiguous, written
};

// Throws std::invalid_argument naming the tensor and what was expected, in the words of the op that it is for.
void run_decoder_layer(const DecoderLayerParams& params);

}  // namespace specbranch

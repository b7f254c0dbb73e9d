// The ops of a layer, one after the other, over memory of the calling thread.
#include "layers/decoder_layer.h"

#include "attention/rotary_commit.h"
#include "attention/tree_attention.h"
#include "core/cpu/elements.h"
#include "core/cpu/memory.h"
#include "layers/gated_activation.h"
#include "layers/rms_norm.h"
#include "linear/linear.h"
#include "linear/packed_linear.h"

namespace specbranch::cpu::SPECBRANCH_ISA {
namespace {

// Tensors [n, columns] between two ops, of the thread's memory.
class Between {
 public:
  Between(const Tensor& hidden, int64_t columns) : rows_(hidden.shape[0]), hidden_(hidden) {
    thread_local Buffer<char> buffer;
    memory_ = buffer.at_least(tensors * line + rows_ * columns * hidden.item_bytes);
  }

  Tensor take(const char* name, int64_t columns) {
    Tensor t = hidden_;
    t.name = name;
    t.data = memory_;
    t.dims = 2;
    t.shape[0] = rows_;
    t.shape[1] = t.stride[0] = columns;
    t.stride[1] = 1;
    memory_ += (rows_ * columns * t.item_bytes + line - 1) / line * line;
    return t;
  }

 private:
  static constexpr int64_t tensors = 16, line = 64;  // as many as are taken, at most
  int64_t rows_;
  Tensor hidden_;
  char* memory_;
};

// Columns [begin, begin + heads * width) of a tensor [n, columns] as [n, heads, width].
Tensor as_heads(Tensor t, const char* name, int64_t begin, int64_t heads, int64_t width) {
  t.name = name;
  t.data = t.as<char>() + begin * t.item_bytes;
  t.dims = 3;
  t.shape[1] = heads;
  t.shape[2] = width;
  t.stride[1] = width;
  t.stride[2] = 1;
  return t;
}

void multiply(const Launch& launch, const LinearLayer& layer, const Tensor& input, const Tensor& output) {
  if (layer.is_packed()) {
    const PackedLinearParams p{launch, input, layer.packed, layer.bias, output};
    check_packed_linear(p);
    return run_packed_linear(p);
  }
  const LinearParams p{launch, input, layer.weight, layer.bias, output};
  check_linear(p);
  run_linear(p);
}

// residual: null for none, else it is added before, and `sum` gets what was normed.
void norm(const Launch& launch, const RmsNorm& norm, const Tensor& input, const Tensor& output,
          const Tensor* residual = nullptr, const Tensor* sum = nullptr) {
  RmsNormParams p;
  p.launch = launch;
  p.input = input;
  p.weight = norm.weight;
  p.eps = norm.eps;
  p.unit_offset = norm.unit_offset;
  p.round_first = norm.round_first;
  p.output = output;
  p.has_residual = residual != nullptr;
  if (p.has_residual) {
    p.residual = *residual;
    p.sum = *sum;
  }
  check_rms_norm(p);
  run_rms_norm(p);
}

template <typename T>
void add_elements(const T* a, const T* b, T* sum, int64_t count) {
  for (int64_t i = 0; i < count; i += simd_width) {
    store_up_to(sum + i, load_up_to(a + i, count - i) + load_up_to(b + i, count - i), count - i);
  }
}

void add(const Tensor& a, const Tensor& b, const Tensor& sum) {
  const int64_t count = a.shape[0] * a.shape[1];
  switch (a.dtype) {
    case Dtype::float32: return add_elements(a.as<const float>(), b.as<const float>(), sum.as<float>(), count);
    case Dtype::bfloat16:
      return add_elements(a.as<const Bfloat16>(), b.as<const Bfloat16>(), sum.as<Bfloat16>(), count);
    default: return add_elements(a.as<const Float16>(), b.as<const Float16>(), sum.as<Float16>(), count);
  }
}

// What the attention adds to the residual, from the normed rows.
void attend(const DecoderLayerParams& p, Between& between, const Tensor& normed, const Tensor& output) {
  const DecoderLayer& layer = *p.layer;
  const int64_t width = p.keys.shape[2], queries = layer.query_heads, heads = layer.kv_heads;
  RotaryCommitParams rotary;
  if (layer.input_count == 1) {
    const Tensor all = between.take("query", layer.inputs[0].out());
    multiply(p.launch, layer.inputs[0], normed, all);
    rotary.query = as_heads(all, "query", 0, queries, width);
    rotary.key = as_heads(all, "key", queries * width, heads, width);
    rotary.value = as_heads(all, "value", (queries + heads) * width, heads, width);
  } else {
    const auto product = [&](int i, const char* name, int64_t count) {
      const Tensor result = between.take(name, layer.inputs[i].out());
      multiply(p.launch, layer.inputs[i], normed, result);
      return as_heads(result, name, 0, count, width);
    };
    rotary.query = product(0, "query", queries);
    rotary.key = product(1, "key", heads);
    rotary.value = product(2, "value", heads);
  }
  rotary.launch = p.launch;
  rotary.cos = p.cos;
  rotary.sin = p.sin;
  rotary.rows = p.rows;
  rotary.keys = p.keys;
  rotary.values = p.values;
  rotary.normed = layer.query.weight.data != nullptr;
  if (rotary.normed) {
    rotary.query_norm = layer.query.weight;
    rotary.key_norm = layer.key.weight;
    rotary.eps = layer.query.eps;
    rotary.unit_offset = layer.query.unit_offset;
    rotary.round_first = layer.query.round_first;
  }
  rotary.interleaved = layer.interleaved;
  rotary.output = as_heads(between.take("query", queries * width), "query", 0, queries, width);
  check_rotary_commit(rotary);
  run_rotary_commit(rotary);

  TreeAttentionParams attention;
  attention.launch = p.launch;
  attention.query = rotary.output;
  attention.keys = p.keys;
  attention.values = p.values;
  attention.prefix_length = p.prefix_length;
  attention.chain = p.chain;
  attention.ancestors = p.ancestors;
  attention.ragged = p.ragged;
  attention.starts = p.starts;
  attention.sequence = p.sequence;
  const Tensor mixed = between.take("attention", queries * width);
  attention.output = as_heads(mixed, "attention", 0, queries, width);
  attention.scale = layer.scale;
  attention.softcap = layer.softcap;
  attention.sliding_window = p.sliding_window;
  check_tree_attention(attention);
  run_tree_attention(attention);
  multiply(p.launch, layer.attention_output, mixed, output);
}

// What the MLP adds, from the normed rows.
void feed_forward(const DecoderLayerParams& p, Between& between, const Tensor& normed, const Tensor& output) {
  const DecoderLayer& layer = *p.layer;
  GatedActivationParams gated;
  gated.launch = p.launch;
  gated.joined = layer.gate_count == 1;
  gated.gate = between.take("gate", layer.gates[0].out());
  multiply(p.launch, layer.gates[0], normed, gated.gate);
  if (!gated.joined) {
    gated.up = between.take("up", layer.gates[1].out());
    multiply(p.launch, layer.gates[1], normed, gated.up);
  }
  gated.activation = layer.activation;
  gated.output = between.take("gated", layer.gates[0].out() / (gated.joined ? 2 : 1));
  check_gated_activation(gated);
  run_gated_activation(gated);
  multiply(p.launch, layer.down, gated.output, output);
}

int64_t columns_between(const DecoderLayerParams& p) {
  const DecoderLayer& layer = *p.layer;
  int64_t columns = 6 * p.hidden.shape[1] + 2 * layer.query_heads * p.keys.shape[2];
  for (int i = 0; i < layer.input_count; ++i) columns += layer.inputs[i].out();
  for (int i = 0; i < layer.gate_count; ++i) columns += 2 * layer.gates[i].out();
  return columns;
}

}  // namespace

void decoder_layer(const DecoderLayerParams& p) {
  const DecoderLayer& layer = *p.layer;
  const int64_t size = p.hidden.shape[1];
  Between between(p.hidden, columns_between(p));
  const Tensor normed = between.take("hidden", size), added = between.take("hidden", size);
  const Tensor sum = between.take("hidden", size), behind = between.take("hidden", size);

  norm(p.launch, layer.before_attention, p.hidden, normed);
  attend(p, between, normed, added);
  const bool norms_behind = layer.behind_attention.weight.data != nullptr;
  if (norms_behind) norm(p.launch, layer.behind_attention, added, behind);
  norm(p.launch, layer.before_mlp, norms_behind ? behind : added, normed, &p.hidden, &sum);
  feed_forward(p, between, normed, added);
  if (norms_behind) norm(p.launch, layer.behind_mlp, added, behind);
  add(sum, norms_behind ? behind : added, p.output);
}

}  // namespace specbranch::cpu::SPECBRANCH_ISA

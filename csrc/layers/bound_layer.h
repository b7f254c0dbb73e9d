// A decoder layer whose weights are bound once, for Python.
#pragma once

#include <pybind11/pybind11.h>

#include <iterator>
#include <string>
#include <vector>

#include "attention/python_sequences.h"
#include "core/python_launch.h"
#include "layers/decoder_layer.h"
#include "layers/gated_activation.h"

namespace specbranch {

inline PackedWeight packed_weight(Object data, const std::string& format, const std::string& kind, int64_t out,
                                  int64_t in) {
  return {weight_format(format), arithmetic(kind), out, in, tensor(data, "packed")};
}

// A layer's weights, bound once: reading a tensor's attributes is most of what a small call costs. They are kept alive.
class BoundLayer {
 public:
  // norms: (weight or None, eps, unit_offset, round_first) of DecoderLayer's six, in its order. Linear layers: (weight,
  // bias) or (data, bias, format, arithmetic, out, in).
  BoundLayer(const py::list& norms, const py::list& inputs, const py::tuple& attention_output, const py::list& gates,
             const py::tuple& down, int64_t query_heads, int64_t kv_heads, bool interleaved, double scale,
             double softcap, const std::string& activation) {
    RmsNorm* const places[] = {&layer_.before_attention,
                               &layer_.behind_attention,
                               &layer_.before_mlp,
                               &layer_.behind_mlp,
                               &layer_.query,
                               &layer_.key};
    for (size_t i = 0; i < std::size(places); ++i) *places[i] = norm(norms[i]);
    layer_.input_count = bind(inputs, layer_.inputs);
    layer_.attention_output = linear_layer(attention_output);
    layer_.gate_count = bind(gates, layer_.gates);
    layer_.down = linear_layer(down);
    layer_.query_heads = query_heads;
    layer_.kv_heads = kv_heads;
    layer_.interleaved = interleaved;
    layer_.scale = scale;
    layer_.softcap = softcap;
    layer_.activation = activation_named(activation);
  }

  // hidden and output [1, n, H].
  void run(Object hidden, Object cos, Object sin, Object rows, Object keys, Object values, Object prefix_length,
           Object ancestors, Object starts, Object sequence, int64_t sliding_window, Object output,
           int64_t threads) const {
    DecoderLayerParams params;
    params.layer = &layer_;
    params.hidden = rows_of(tensor(hidden, "hidden"));
    params.cos = tensor(cos, "cos");
    params.sin = tensor(sin, "sin");
    params.rows = tensor(rows, "rows");
    params.keys = tensor(keys, "keys");
    params.values = tensor(values, "values");
    params.prefix_length = tensor(prefix_length, "prefix_length");
    params.chain = ancestors.is_none();
    if (!params.chain) params.ancestors = tensor(ancestors, "ancestors");
    params.ragged = take_sequences(starts, sequence, &params.starts, &params.sequence);
    params.sliding_window = sliding_window;
    params.output = rows_of(tensor(output, "output"));
    params.launch =
        launch_on({&params.hidden, &params.cos, &params.sin, &params.rows, &params.keys, &params.values,
                   &params.prefix_length, &params.ancestors, &params.starts, &params.sequence, &params.output},
                  threads);
    py::gil_scoped_release unlocked;
    run_decoder_layer(params);
  }

 private:
  static Tensor rows_of(Tensor t) {
    if (t.dims != 3 || t.shape[0] != 1) fail(std::string(t.name) + ": expected shape [1, n, H], got " + shape_text(t));
    check_contiguous(t);
    t.dims = 2;
    t.shape[0] = t.shape[1];
    t.shape[1] = t.stride[0] = t.shape[2];
    t.stride[1] = 1;
    return t;
  }

  Tensor keep(const py::object& object, const char* name) {
    if (object.is_none()) return {};
    kept_.push_back(object);
    return tensor(object, name);
  }

  RmsNorm norm(const py::tuple& given) {
    return {keep(given[0], "weight"), given[1].cast<double>(), given[2].cast<bool>(), given[3].cast<bool>()};
  }

  LinearLayer linear_layer(const py::tuple& given) {
    LinearLayer layer;
    layer.bias = keep(given[1], "bias");
    if (given.size() == 2) {
      layer.weight = keep(given[0], "weight");
      return layer;
    }
    layer.packed = packed_weight(given[0], given[2].cast<std::string>(), given[3].cast<std::string>(),
                                 given[4].cast<int64_t>(), given[5].cast<int64_t>());
    kept_.push_back(given[0]);
    return layer;
  }

  template <size_t most>
  int bind(const py::list& given, LinearLayer (&layers)[most]) {
    if (given.size() != 1 && given.size() != most) fail("expected one linear layer or " + std::to_string(most));
    for (size_t i = 0; i < given.size(); ++i) layers[i] = linear_layer(given[i]);
    return static_cast<int>(given.size());
  }

  DecoderLayer layer_;
  std::vector<py::object> kept_;
};

}  // namespace specbranch

// The Python module specbranch_ext._C. Tensors are torch's, read by python_tensor.h. Every op takes the arguments of
// its schema (specbranch_ext/ops), then its outputs, allocated by the caller, then where it runs: see launch_on. It
// checks its arguments (ValueError) and runs without the GIL.
#include <pybind11/pybind11.h>

#include <cstring>
#include <vector>

#include "attention/ancestor_mask.h"
#ifdef SPECBRANCH_WITH_CUDA
#include "core/cuda/runtime.h"
#endif
#include "sampling/draft_sample.h"
#ifdef SPECBRANCH_EMULATED
#include "emulator/emulator.h"
#endif
#include "attention/python_sequences.h"
#include "attention/rotary_commit.h"
#include "attention/tree_attention.h"
#include "cache/kv_commit.h"
#include "core/isa.h"
#include "core/python_launch.h"
#include "core/python_tensor.h"
#include "layers/bound_layer.h"
#include "layers/gated_activation.h"
#include "layers/rms_norm.h"
#include "linear/linear.h"
#include "linear/pack_blocks.h"
#include "linear/pack_weight.h"
#include "linear/packed_linear.h"
#include "linear/quantize_weight.h"
#include "linear/unpack_rows.h"
#include "sampling/advance.h"
#include "sampling/gumbel_noise.h"
#include "sampling/verify.h"
#include "sampling/verify_rejection.h"

namespace specbranch {
namespace {

Tensor optional_tensor(Object object, const char* name) { return object.is_none() ? Tensor{} : tensor(object, name); }

// The tensor `filters` in place of numbers: on the CPU, those of all rows are read and those of each row checked here.
// launch_on has checked its device.
template <typename Params>
void take_filters(Params& params, const Tensor& filters, const Tensor& logits) {
  check_filters_tensor(filters, params.filters, logits.shape[0]);
  const Filters* first = filters.as<const Filters>();
  const bool by_row = filters.dims == 2;
  if (by_row || params.launch.on_cuda()) {
    params.filters_in_memory = {first, by_row};
  } else {
    params.filters = *first;
  }
  if (!by_row || params.launch.on_cuda()) return;
  for (int64_t i = 0; i < filters.shape[0]; ++i) check_filters(first[i], "filters: row " + std::to_string(i) + ": ");
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["isa_levels"] = py::str(SPECBRANCH_ISA_NAMES).attr("split")(",");
  info["isa"] = isa_name(isa());
#ifdef SPECBRANCH_X86
  info["exact_blocks"] = isa() >= Isa::bf16;
#else
  info["exact_blocks"] = false;
#endif
#ifdef SPECBRANCH_WITH_CUDA
  info["cuda"] = true;
  info["cuda_compiler"] = SPECBRANCH_CUDA_COMPILER;
  info["cuda_architectures"] = py::str(SPECBRANCH_CUDA_ARCHITECTURES).attr("split")(",");
#else
  info["cuda"] = false;
#endif
  info["cuda_reason"] = SPECBRANCH_CUDA_REASON;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = 0;
#endif
  return info;
}

void gumbel_noise(Object positions, int64_t /*vocabulary*/, Object seed, Object noise, int64_t handle) {
  GumbelNoiseParams params{{}, tensor(positions, "positions"), tensor(seed, "seed"), tensor(noise, "noise")};
  params.launch = launch_on({&params.positions, &params.seed, &params.noise}, handle);
  check_gumbel_noise(params);
  py::gil_scoped_release unlocked;
  run_gumbel_noise(params);
}

void ancestor_mask(Object parents, Object ancestors, Object depths, int64_t handle) {
  AncestorMaskParams params{{}, tensor(parents, "parents"), tensor(ancestors, "ancestors"), tensor(depths, "depths")};
  params.launch = launch_on({&params.parents, &params.ancestors, &params.depths}, handle);
  check_ancestor_mask(params);
  py::gil_scoped_release unlocked;
  run_ancestor_mask(params);
}

void tree_attention(Object query, Object keys, Object values, Object prefix_length, Object ancestors, double scale,
                    int64_t sliding_window, double softcap, bool by_position, Object starts, Object sequence,
                    Object output, int64_t handle, Object workspace, Object tickets) {
  TreeAttentionParams params;
  params.query = tensor(query, "query");
  params.keys = tensor(keys, "keys");
  params.values = tensor(values, "values");
  params.prefix_length = tensor(prefix_length, "prefix_length");
  params.chain = ancestors.is_none();
  if (!params.chain) params.ancestors = tensor(ancestors, "ancestors");
  params.ragged = take_sequences(starts, sequence, &params.starts, &params.sequence);
  params.output = tensor(output, "output");
  params.scale = scale;
  params.sliding_window = sliding_window;
  params.softcap = softcap;
  params.by_position = by_position;
  params.launch = launch_on({&params.query, &params.keys, &params.values, &params.prefix_length, &params.ancestors,
                             &params.starts, &params.sequence, &params.output},
                            handle, workspace, tickets);
  check_tree_attention(params);
  py::gil_scoped_release unlocked;
  run_tree_attention(params);
}

void rotary_commit(Object query, Object key, Object value, Object cos, Object sin, Object rows, Object keys,
                   Object values, Object query_norm, Object key_norm, double eps, bool unit_offset, bool round_first,
                   bool interleaved, Object output, int64_t handle) {
  RotaryCommitParams params;
  params.query = tensor(query, "query");
  params.key = tensor(key, "key");
  params.value = tensor(value, "value");
  params.cos = tensor(cos, "cos");
  params.sin = tensor(sin, "sin");
  params.rows = tensor(rows, "rows");
  params.keys = tensor(keys, "keys");
  params.values = tensor(values, "values");
  params.normed = !query_norm.is_none();
  if (params.normed == key_norm.is_none()) {
    const bool missing = key_norm.is_none();
    fail(std::string(missing ? "key_norm" : "query_norm") + ": expected a tensor, as " +
         (missing ? "query_norm" : "key_norm") + " is one, got None");
  }
  if (params.normed) {
    params.query_norm = tensor(query_norm, "query_norm");
    params.key_norm = tensor(key_norm, "key_norm");
  }
  params.output = tensor(output, "output");
  params.eps = eps;
  params.unit_offset = unit_offset;
  params.round_first = round_first;
  params.interleaved = interleaved;
  params.launch = launch_on({&params.query, &params.key, &params.value, &params.cos, &params.sin, &params.rows,
                             &params.keys, &params.values, &params.query_norm, &params.key_norm, &params.output},
                            handle);
  check_rotary_commit(params);
  py::gil_scoped_release unlocked;
  run_rotary_commit(params);
}

void kv_commit(const py::list& buffers, Object rows, Object start, int64_t handle) {
  std::vector<Tensor> views;
  views.reserve(buffers.size());
  for (const py::handle buffer : buffers) views.push_back(tensor(buffer, "buffers"));
  KvCommitParams params{
      {}, views.data(), static_cast<int64_t>(views.size()), tensor(rows, "rows"), tensor(start, "start")};
  params.launch = launch_on({&params.rows, &params.start}, handle);
  for (const Tensor& view : views) check_same_device(params.rows, view);
  check_kv_commit(params);
  py::gil_scoped_release unlocked;
  run_kv_commit(params);
}

void rms_norm(Object input, Object weight, Object residual, double eps, bool unit_offset, bool round_first,
              Object output, Object sum, int64_t handle) {
  RmsNormParams params;
  params.input = tensor(input, "input");
  params.weight = tensor(weight, "weight");
  params.has_residual = !residual.is_none();
  params.eps = eps;
  params.unit_offset = unit_offset;
  params.round_first = round_first;
  params.output = tensor(output, "output");
  if (params.has_residual) {
    params.residual = tensor(residual, "residual");
    params.sum = tensor(sum, "sum");
  }
  params.launch = launch_on({&params.input, &params.weight, &params.residual, &params.output, &params.sum}, handle);
  check_rms_norm(params);
  py::gil_scoped_release unlocked;
  run_rms_norm(params);
}

void gated_activation(Object gate, Object up, const std::string& activation, Object output, int64_t handle) {
  GatedActivationParams params;
  params.gate = tensor(gate, "gate");
  params.joined = up.is_none();
  if (!params.joined) params.up = tensor(up, "up");
  params.activation = activation_named(activation);
  params.output = tensor(output, "output");
  params.launch = launch_on({&params.gate, &params.up, &params.output}, handle);
  check_gated_activation(params);
  py::gil_scoped_release unlocked;
  run_gated_activation(params);
}

#ifndef SPECBRANCH_EMULATED
void linear(Object input, Object weight, Object bias, Object output, int64_t handle) {
  LinearParams params{{}, tensor(input, "input"), tensor(weight, "weight"), {}, tensor(output, "output")};
  if (!bias.is_none()) params.bias = tensor(bias, "bias");
  params.launch = launch_on({&params.input, &params.weight, &params.bias, &params.output}, handle);
  check_linear(params);
  py::gil_scoped_release unlocked;
  run_linear(params);
}

int64_t bytes_when_packed(Object weight, const std::string& format, int64_t threads) {
  const Tensor w = tensor(weight, "weight");
  const WeightFormat kind = weight_format(format);
  py::gil_scoped_release unlocked;
  return packed_bytes(w, kind, static_cast<int>(threads));
}

void pack_weight(Object weight, const std::string& format, Object packed, int64_t handle) {
  PackWeightParams params{{}, tensor(weight, "weight"), {}};
  check_shape(params.weight, {-1, -1}, "[out, in]");
  params.packed = packed_weight(packed, format, "exact", params.weight.shape[0], params.weight.shape[1]);
  params.launch = launch_on({&params.weight, &params.packed.data}, handle);
  check_pack_weight(params);
  py::gil_scoped_release unlocked;
  run_pack_weight(params);
}

void pack_blocks(Object blocks, const std::string& format, const std::string& kind, Object packed, int64_t handle) {
  PackBlocksParams params{{}, tensor(blocks, "blocks"), {}};
  check_shape(params.blocks, {-1, -1}, "[out, bytes of a row]");
  const int64_t in = weights_of_blocks(params.blocks.shape[1], weight_format(format));
  params.packed = packed_weight(packed, format, kind, params.blocks.shape[0], in);
  params.launch = launch_on({&params.blocks, &params.packed.data}, handle);
  check_pack_blocks(params);
  py::gil_scoped_release unlocked;
  run_pack_blocks(params);
}

void quantize_weight(Object weight, const std::string& format, Object blocks, int64_t handle) {
  int64_t odd_row = -1;
  QuantizeWeightParams params{{}, tensor(weight, "weight"), weight_format(format), tensor(blocks, "blocks"), &odd_row};
  params.launch = launch_on({&params.weight, &params.blocks}, handle);
  check_quantize_weight(params);
  py::gil_scoped_release unlocked;
  run_quantize_weight(params);
}

void unpack_rows(Object packed, const std::string& format, const std::string& kind, int64_t out, int64_t in,
                 Object rows, Object output, int64_t handle) {
  UnpackRowsParams params{
      {}, packed_weight(packed, format, kind, out, in), tensor(rows, "rows"), tensor(output, "output")};
  params.launch = launch_on({&params.packed.data, &params.rows, &params.output}, handle);
  check_unpack_rows(params);
  py::gil_scoped_release unlocked;
  run_unpack_rows(params);
}

void packed_linear(Object input, Object packed, const std::string& format, const std::string& kind, int64_t out,
                   Object bias, Object output, int64_t handle) {
  PackedLinearParams params{{}, tensor(input, "input"), {}, {}, tensor(output, "output")};
  if (params.input.dims < 1) fail("input: expected shape [..., in], got []");
  params.weight = packed_weight(packed, format, kind, out, params.input.shape[params.input.dims - 1]);
  if (!bias.is_none()) params.bias = tensor(bias, "bias");
  params.launch = launch_on({&params.input, &params.weight.data, &params.bias, &params.output}, handle);
  check_packed_linear(params);
  py::gil_scoped_release unlocked;
  run_packed_linear(params);
}
#endif

void verify(Object target_logits, Object tokens, Object parents, Object positions, Object seed, double temperature,
            int64_t top_k, double top_p, double min_p, Object filters, Object roots, Object allowed,
            Object target_tokens, Object path, Object accepted, Object next_token, int64_t handle, Object workspace,
            Object tickets) {
  RowReport report;
  const Tensor filters_tensor = optional_tensor(filters, "filters");
  VerifyParams params{{},
                      tensor(target_logits, "target_logits"),
                      tensor(tokens, "tokens"),
                      tensor(parents, "parents"),
                      tensor(positions, "positions"),
                      tensor(seed, "seed"),
                      {temperature, static_cast<double>(top_k), top_p, min_p},
                      {},
                      !roots.is_none(),
                      optional_tensor(roots, "roots"),
                      !allowed.is_none(),
                      optional_tensor(allowed, "allowed"),
                      tensor(target_tokens, "target_tokens"),
                      tensor(path, "path"),
                      tensor(accepted, "accepted"),
                      tensor(next_token, "next_token"),
                      &report};
  params.launch = launch_on(
      {&params.target_logits, &params.tokens, &params.parents, &params.positions, &params.seed, &filters_tensor,
       &params.roots, &params.allowed, &params.target_tokens, &params.path, &params.accepted, &params.next_token},
      handle, workspace, tickets);
  if (!filters.is_none()) take_filters(params, filters_tensor, params.target_logits);
  check_verify(params);
  {
    py::gil_scoped_release unlocked;
    run_verify(params);
  }
  report.raise(params.target_logits, params.has_allowed);
}

void verify_rejection(Object target_logits, Object draft_logits, Object tokens, Object positions, Object seed,
                      double temperature, int64_t top_k, double top_p, double min_p, bool block, Object allowed,
                      Object accepted, Object next_token, int64_t handle, Object workspace, Object tickets) {
  RowReport target_report, draft_report;
  VerifyRejectionParams params{{},
                               tensor(target_logits, "target_logits"),
                               tensor(draft_logits, "draft_logits"),
                               tensor(tokens, "tokens"),
                               tensor(positions, "positions"),
                               tensor(seed, "seed"),
                               {temperature, static_cast<double>(top_k), top_p, min_p},
                               block,
                               !allowed.is_none(),
                               optional_tensor(allowed, "allowed"),
                               tensor(accepted, "accepted"),
                               tensor(next_token, "next_token"),
                               &target_report,
                               &draft_report};
  params.launch = launch_on({&params.target_logits, &params.draft_logits, &params.tokens, &params.positions,
                             &params.seed, &params.allowed, &params.accepted, &params.next_token},
                            handle, workspace, tickets);
  check_verify_rejection(params);
  {
    py::gil_scoped_release unlocked;
    run_verify_rejection(params);
  }
  target_report.raise(params.target_logits, params.has_allowed);
  draft_report.raise(params.draft_logits, params.has_allowed);
}

void draft_sample(Object draft_logits, Object positions, int64_t /*k*/, Object seed, double temperature, int64_t top_k,
                  double top_p, double min_p, Object filters, Object allowed, Object tokens, Object scores,
                  Object confidence, Object entropy, int64_t handle, Object workspace) {
  RowReport report;
  const Tensor filters_tensor = optional_tensor(filters, "filters");
  DraftSampleParams params{{},
                           tensor(draft_logits, "draft_logits"),
                           tensor(positions, "positions"),
                           tensor(seed, "seed"),
                           {temperature, static_cast<double>(top_k), top_p, min_p},
                           {},
                           !allowed.is_none(),
                           optional_tensor(allowed, "allowed"),
                           tensor(tokens, "tokens"),
                           tensor(scores, "scores"),
                           tensor(confidence, "confidence"),
                           tensor(entropy, "entropy"),
                           &report};
  params.launch = launch_on({&params.draft_logits, &params.positions, &params.seed, &filters_tensor, &params.allowed,
                             &params.tokens, &params.scores, &params.confidence, &params.entropy},
                            handle, workspace);
  if (!filters.is_none()) take_filters(params, filters_tensor, params.draft_logits);
  check_draft_sample(params);
  {
    py::gil_scoped_release unlocked;
    run_draft_sample(params);
  }
  report.raise(params.draft_logits, params.has_allowed);
}

DraftResults draft_results(const py::list& tensors, const char* name, const char* const (&names)[4]) {
  if (tensors.size() != 4) {
    fail(std::string(name) + ": expected 4 tensors (tokens, scores, confidence, entropy), got " +
         std::to_string(tensors.size()));
  }
  return {tensor(tensors[0], names[0]), tensor(tensors[1], names[1]), tensor(tensors[2], names[2]),
          tensor(tensors[3], names[3])};
}

void advance(const py::list& buffers, const py::list& sample, Object ids, Object positions, Object next_positions,
             Object rows, Object strides, Object ancestors, Object prefix, Object slot, int64_t spare, int64_t handle) {
  AdvanceParams params{{},
                       draft_results(buffers, "buffers", {"buffers[0]", "buffers[1]", "buffers[2]", "buffers[3]"}),
                       draft_results(sample, "sample", {"sample[0]", "sample[1]", "sample[2]", "sample[3]"}),
                       tensor(ids, "ids"),
                       tensor(positions, "positions"),
                       tensor(next_positions, "next_positions"),
                       tensor(rows, "rows"),
                       tensor(strides, "strides"),
                       tensor(ancestors, "ancestors"),
                       tensor(prefix, "prefix"),
                       tensor(slot, "slot"),
                       spare};
  params.launch = launch_on({&params.ids, &params.positions, &params.next_positions, &params.rows, &params.strides,
                             &params.ancestors, &params.prefix, &params.slot},
                            handle);
  for (const DraftResults* results : {&params.buffers, &params.sample}) {
    for (const Tensor* t : {&results->tokens, &results->scores, &results->confidence, &results->entropy}) {
      check_same_device(params.ids, *t);
    }
  }
  check_advance(params);
  py::gil_scoped_release unlocked;
  run_advance(params);
}

}  // namespace
}  // namespace specbranch

PYBIND11_MODULE(SPECBRANCH_MODULE, m) {
  m.doc() = "The compiled core of specbranch: see specbranch_ext.ops for the functions meant for use.";
  m.attr("emulated") = specbranch::emulated;
  m.def("build_info", &specbranch::build_info);
  m.def("gumbel_noise", &specbranch::gumbel_noise);
  m.def("ancestor_mask", &specbranch::ancestor_mask);
  m.def("tree_attention", &specbranch::tree_attention);
  m.def("rotary_commit", &specbranch::rotary_commit);
  m.def("kv_commit", &specbranch::kv_commit);
  m.def("rms_norm", &specbranch::rms_norm);
  m.def("gated_activation", &specbranch::gated_activation);
  m.def("verify", &specbranch::verify);
  m.def("verify_rejection", &specbranch::verify_rejection);
  m.def("draft_sample", &specbranch::draft_sample);
  m.def("advance", &specbranch::advance);
#ifdef SPECBRANCH_EMULATED
  m.def("launches", &specbranch::emulator::launches);
#else
  m.def("linear", &specbranch::linear);
  m.def("packed_bytes", &specbranch::bytes_when_packed);
  m.def("pack_weight", &specbranch::pack_weight);
  m.def("weights_of_blocks", [](int64_t row_bytes, const std::string& format) {
    return specbranch::weights_of_blocks(row_bytes, specbranch::weight_format(format));
  });
  m.def("packed_rows_bytes", [](int64_t out, int64_t in, const std::string& format, const std::string& kind) {
    return specbranch::packed_rows_bytes(out, in, specbranch::weight_format(format), specbranch::arithmetic(kind));
  });
  m.def("packed_group",
        [](const std::string& format) { return specbranch::packed_group(specbranch::weight_format(format)); });
  m.def("pack_blocks", &specbranch::pack_blocks);
  m.def("quantize_weight", &specbranch::quantize_weight);
  m.def("unpack_rows", &specbranch::unpack_rows);
  m.def("packed_linear", &specbranch::packed_linear);
  pybind11::class_<specbranch::BoundLayer>(m, "DecoderLayer")
      .def(pybind11::init<const pybind11::list&, const pybind11::list&, const pybind11::tuple&, const pybind11::list&,
                          const pybind11::tuple&, int64_t, int64_t, bool, double, double, const std::string&>())
      .def("run", &specbranch::BoundLayer::run);
#endif
#ifdef SPECBRANCH_WITH_CUDA
  m.def("cuda_runtime_report", &specbranch::cuda::runtime_report);
  m.def("cuda_device_problem", &specbranch::cuda::device_problem);
  m.def("capture_id", &specbranch::cuda::capture_id);
#endif
#ifdef SPECBRANCH_HAS_CUDA_KERNELS
  m.def("verify_workspace", [](int64_t n, int64_t vocabulary, double temperature, int64_t top_k, double top_p,
                               double min_p, bool any_filters) {
    return specbranch::cuda::verify_workspace(n, vocabulary, {temperature, static_cast<double>(top_k), top_p, min_p},
                                              any_filters);
  });
  m.def("verify_rejection_workspace",
        [](int64_t n, int64_t vocabulary, double temperature, int64_t top_k, double top_p, double min_p) {
          return specbranch::cuda::verify_rejection_workspace(n, vocabulary,
                                                              {temperature, static_cast<double>(top_k), top_p, min_p});
        });
  m.def("draft_sample_workspace", [](int64_t b, int64_t vocabulary, int64_t k, double temperature, int64_t top_k,
                                     double top_p, double min_p, bool any_filters) {
    return specbranch::cuda::draft_sample_workspace(
        b, vocabulary, k, {temperature, static_cast<double>(top_k), top_p, min_p}, any_filters);
  });
  m.def("tree_attention_workspace", &specbranch::cuda::tree_attention_workspace);
#endif
}

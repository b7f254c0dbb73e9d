// The Python module specbranch_ext._C. Arguments are torch tensors, read by python_tensor.h; outputs are allocated
// by the caller. Every op checks its arguments (ValueError) and runs without the GIL.
#include <pybind11/pybind11.h>

#include <vector>

#include "ancestor_mask.h"
#include "draft_sample.h"
#include "gumbel_noise.h"
#include "isa.h"
#include "kv_commit.h"
#include "linear.h"
#include "python_tensor.h"
#include "tree_attention.h"
#include "verify.h"

namespace specbranch {
namespace {

using Object = const py::object&;

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["isa_levels"] = py::str(SPECBRANCH_ISA_NAMES).attr("split")(",");
  info["isa"] = isa_name(isa());
#ifdef SPECBRANCH_WITH_CUDA
  info["cuda"] = true;
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

void gumbel_noise(Object positions, Object seed, Object noise, int threads) {
  const GumbelNoiseParams params{
      {threads}, tensor(positions, "positions"), tensor(seed, "seed"), tensor(noise, "noise")};
  check_gumbel_noise(params);
  py::gil_scoped_release unlocked;
  run_gumbel_noise(params);
}

void ancestor_mask(Object parents, Object ancestors, Object depths, int threads) {
  const AncestorMaskParams params{
      {threads}, tensor(parents, "parents"), tensor(ancestors, "ancestors"), tensor(depths, "depths")};
  check_ancestor_mask(params);
  py::gil_scoped_release unlocked;
  run_ancestor_mask(params);
}

void tree_attention(Object query, Object keys, Object values, Object prefix_length, Object ancestors, Object output,
                    float scale, int64_t sliding_window, float softcap, int threads) {
  TreeAttentionParams params;
  params.launch.threads = threads;
  params.query = tensor(query, "query");
  params.keys = tensor(keys, "keys");
  params.values = tensor(values, "values");
  params.prefix_length = tensor(prefix_length, "prefix_length");
  params.chain = ancestors.is_none();
  if (!params.chain) params.ancestors = tensor(ancestors, "ancestors");
  params.output = tensor(output, "output");
  params.scale = scale;
  params.sliding_window = sliding_window;
  params.softcap = softcap;
  params.tree_rows = check_tree_attention(params);
  py::gil_scoped_release unlocked;
  run_tree_attention(params);
}

void kv_commit(const py::list& buffers, Object rows, Object start, int threads) {
  std::vector<Tensor> views;
  views.reserve(buffers.size());
  for (const py::handle buffer : buffers) views.push_back(tensor(buffer, "buffers"));
  const KvCommitParams params{{threads}, views.data(), static_cast<int64_t>(views.size()), tensor(rows, "rows"),
                              tensor(start, "start")};
  check_kv_commit(params);
  py::gil_scoped_release unlocked;
  run_kv_commit(params);
}

void linear(Object input, Object weight, Object bias, Object output, int threads) {
  LinearParams params{
      {threads}, tensor(input, "input"), tensor(weight, "weight"), {}, tensor(output, "output")};
  if (!bias.is_none()) params.bias = tensor(bias, "bias");
  check_linear(params);
  py::gil_scoped_release unlocked;
  run_linear(params);
}

void verify(Object target_logits, Object tokens, Object parents, Object positions, Object seed, double temperature,
            int64_t top_k, double top_p, double min_p, Object target_tokens, Object path, Object accepted,
            Object next_token, int threads) {
  RowReport report;
  const VerifyParams params{{threads},
                            tensor(target_logits, "target_logits"),
                            tensor(tokens, "tokens"),
                            tensor(parents, "parents"),
                            tensor(positions, "positions"),
                            tensor(seed, "seed"),
                            {temperature, top_k, top_p, min_p},
                            tensor(target_tokens, "target_tokens"),
                            tensor(path, "path"),
                            tensor(accepted, "accepted"),
                            tensor(next_token, "next_token"),
                            &report};
  check_verify(params);
  {
    py::gil_scoped_release unlocked;
    run_verify(params);
  }
  report.raise(params.target_logits);
}

void draft_sample(Object draft_logits, Object positions, Object seed, double temperature, int64_t top_k, double top_p,
                  double min_p, Object tokens, Object scores, Object confidence, Object entropy, int threads) {
  RowReport report;
  const DraftSampleParams params{{threads},
                                 tensor(draft_logits, "draft_logits"),
                                 tensor(positions, "positions"),
                                 tensor(seed, "seed"),
                                 {temperature, top_k, top_p, min_p},
                                 tensor(tokens, "tokens"),
                                 tensor(scores, "scores"),
                                 tensor(confidence, "confidence"),
                                 tensor(entropy, "entropy"),
                                 &report};
  check_draft_sample(params);
  {
    py::gil_scoped_release unlocked;
    run_draft_sample(params);
  }
  report.raise(params.draft_logits);
}

}  // namespace
}  // namespace specbranch

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of specbranch: see specbranch_ext.ops for the functions meant for use.";
  m.def("build_info", &specbranch::build_info);
  m.def("gumbel_noise", &specbranch::gumbel_noise);
  m.def("ancestor_mask", &specbranch::ancestor_mask);
  m.def("tree_attention", &specbranch::tree_attention);
  m.def("kv_commit", &specbranch::kv_commit);
  m.def("linear", &specbranch::linear);
  m.def("verify", &specbranch::verify);
  m.def("draft_sample", &specbranch::draft_sample);
}

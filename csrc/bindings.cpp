// The Python module specbranch_ext._C. Arguments are torch tensors, read by python_tensor.h; outputs are allocated
// by the caller. Every op checks its arguments (ValueError) and runs without the GIL.
#include <pybind11/pybind11.h>

#include "gumbel_noise.h"
#include "isa.h"
#include "python_tensor.h"

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
  py::gil_scoped_release unlocked;
  run_gumbel_noise(params);
}

}  // namespace
}  // namespace specbranch

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of specbranch: see specbranch_ext.ops for the functions meant for use.";
  m.def("build_info", &specbranch::build_info);
  m.def("gumbel_noise", &specbranch::gumbel_noise);
}

// Where an op runs: from its tensors, and what Python hands over beside them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <initializer_list>
#include <string>

#include "core/python_tensor.h"

namespace specbranch {

using Object = const py::object&;

#ifdef SPECBRANCH_EMULATED
constexpr bool emulated = true;
#else
constexpr bool emulated = false;
#endif

inline void check_same_device(const Tensor& first, const Tensor& other) {
  if (other.data == nullptr || other.device == first.device) return;
  const auto where = [](int device) {
    return device == cpu_device ? std::string("the CPU") : "CUDA device " + std::to_string(device);
  };
  fail(std::string(other.name) + ": expected a tensor on " + where(first.device) + " as " + first.name +
       " is, got one on " + where(other.device));
}

// Where an op runs: where its tensors are, which must be one device. `handle` is the number of threads on the CPU, and
// the current stream on a CUDA device.
inline Launch launch_on(std::initializer_list<const Tensor*> tensors, int64_t handle,
                        const py::object& workspace = py::none(), const py::object& tickets = py::none()) {
  const Tensor& first = **tensors.begin();
  for (const Tensor* t : tensors) check_same_device(first, *t);
  Launch launch;
  launch.device = emulated ? 0 : first.device;
  if (launch.on_cuda()) {
    launch.stream = reinterpret_cast<void*>(handle);
    if (!workspace.is_none()) {
      const Tensor memory = tensor(workspace, "workspace");
      launch.workspace = memory.data;
      // Nobody may count on what it holds.
      if (emulated && memory.shape[0] > 0) std::memset(memory.data, 0xA5, memory.shape[0]);
    }
    if (!tickets.is_none()) launch.tickets = tensor(tickets, "tickets").as<unsigned>();
  } else {
    launch.threads = static_cast<int>(handle);
  }
  return launch;
}

}  // namespace specbranch

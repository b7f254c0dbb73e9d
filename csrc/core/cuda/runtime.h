// What the CUDA runtime finds on this machine; readable without the CUDA headers.
#pragma once

#include <cstdint>
#include <string>

namespace specbranch::cuda {

// Driver and runtime versions and the devices, or why there are none. Never throws.
std::string runtime_report();

// Why no kernel of this build can run on a device: a driver that is too old, an architecture that was not built. Empty
// when they can.
std::string device_problem(int device);

// The id of the capture that a stream (a cudaStream_t as an integer) is part of; 0 when there is none.
uint64_t capture_id(int64_t stream);

}  // namespace specbranch::cuda

// What the CUDA runtime finds on this machine; readable without the CUDA headers.
#pragma once

#include <string>

namespace specbranch::cuda {

// Driver and runtime versions and the devices, or why there are none. Never throws.
std::string runtime_report();

}  // namespace specbranch::cuda

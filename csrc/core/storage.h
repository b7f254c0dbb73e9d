// Storage types of 16-bit floats.
#pragma once

#include <cstdint>

namespace specbranch {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace specbranch

// One block of memory that is cut into aligned parts, one after another. Without memory it only adds up the bytes: the
// size that is needed.
#pragma once

#include <cstdint>

#include "core/bits.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

template <int64_t alignment>
struct Workspace {
  char* memory = nullptr;  // aligned
  int64_t bytes = 0;       // taken so far

  explicit Workspace(void* memory) : memory(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    T* part = memory != nullptr ? reinterpret_cast<T*>(memory + bytes) : nullptr;
    bytes += divide_up(count * static_cast<int64_t>(sizeof(T)), alignment) * alignment;
    return part;
  }
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

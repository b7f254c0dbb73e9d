// Memory of the CPU kernels. No std::vector: its code could be merged with that of another instruction-set level.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "core/isa.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

// Uninitialised memory for plain types, aligned to cache lines. One that is thread_local and grows as needed saves a
// call fresh pages, which cost more than a small op.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { at_least(count); }
  ~Buffer() { std::free(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // Room for `count` items. What the buffer held is lost when it grows.
  T* at_least(int64_t count) {
    if (data_ == nullptr || count > count_) {
      std::free(memory_);
      memory_ = std::malloc(static_cast<size_t>(count) * sizeof(T) + cache_line);
      data_ = nullptr;
      if (memory_ == nullptr) throw std::bad_alloc();
      data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_) + cache_line - 1) / cache_line * cache_line);
      count_ = count;
    }
    return data_;
  }
  T& operator[](int64_t i) { return data_[i]; }
  T* at(int64_t i) { return data_ + i; }

 private:
  static constexpr size_t cache_line = 64;  // bytes
  void* memory_ = nullptr;
  T* data_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

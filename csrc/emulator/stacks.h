// Stacks of fibers.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <memory>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define SPECBRANCH_EMULATOR_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SPECBRANCH_EMULATOR_ASAN
#endif
#endif
#ifdef SPECBRANCH_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace specbranch::emulator {

#ifdef SPECBRANCH_EMULATOR_ASAN
constexpr size_t stack_bytes = 256 * 1024;
#else
constexpr size_t stack_bytes = 64 * 1024;
#endif

struct Stack {
  char* bottom;
  char* top;
};

// Stacks of fibers, each above a page that must not be touched. They are kept for the next launch.
class StackPool {
 public:
  Stack* take() {
    if (free_.empty()) grow();
    Stack* stack = free_.back();
    free_.pop_back();
#ifdef SPECBRANCH_EMULATOR_ASAN
    __asan_unpoison_memory_region(stack->bottom, stack_bytes);  // of frames that were left for good
#endif
    return stack;
  }
  void give_back(Stack* stack) { free_.push_back(stack); }

 private:
  static constexpr int chunk = 32;

  void grow() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t stride = stack_bytes + page;
    void* memory = mmap(nullptr, chunk * stride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    free_.reserve(free_.size() + chunk);
    for (int i = chunk - 1; i >= 0; --i) {
      char* start = static_cast<char*>(memory) + i * stride;
      mprotect(start, page, PROT_NONE);
      // Tops at different places in a page: threads do the same things at the same depth, and their stacks would
      // otherwise compete for the same cache sets.
      const size_t colour = static_cast<size_t>(i) * 7 % 64 * 64;
      stacks_.push_back(std::make_unique<Stack>(Stack{start + page, start + stride - colour}));
      free_.push_back(stacks_.back().get());
    }
  }

  std::vector<std::unique_ptr<Stack>> stacks_;
  std::vector<Stack*> free_;
};

}  // namespace specbranch::emulator

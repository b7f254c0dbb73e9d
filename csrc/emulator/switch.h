// Changing from one stack to another.
//
//   switch_stack(&saved, target)   saves the caller's registers on its stack, its stack pointer in `saved`, and goes on
//                                  where `target` was saved
//   prepare_stack(bottom, top, f)  what to pass as `target` to start f() on a fresh stack; f never returns
//
// A dozen instructions in assembly: swapcontext of the C library makes a system call each time, and a barrier of 256
// threads is 256 changes. Only registers that a called function must preserve are kept.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(__ILP32__) && !defined(SPECBRANCH_EMULATOR_UCONTEXT)
#define SPECBRANCH_EMULATOR_X86_64
#elif defined(__aarch64__) && !defined(__APPLE__) && !defined(SPECBRANCH_EMULATOR_UCONTEXT)
#define SPECBRANCH_EMULATOR_AARCH64
#else
#include <ucontext.h>
#endif

namespace specbranch::emulator {

#if defined(SPECBRANCH_EMULATOR_X86_64)

extern "C" __attribute__((visibility("hidden"))) void specbranch_switch_stack(void** saved, void* target);
asm(R"(
.text
.globl specbranch_switch_stack
.hidden specbranch_switch_stack
.type specbranch_switch_stack,@function
.p2align 4
specbranch_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size specbranch_switch_stack,.-specbranch_switch_stack
)");

inline void switch_stack(void** saved, void* target) { specbranch_switch_stack(saved, target); }

inline void* prepare_stack(char*, char* top, void (*f)()) {
  void** words = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  *--words = nullptr;  // where a return address would be: ends a debugger's backtrace, and aligns the stack for f
  *--words = reinterpret_cast<void*>(f);
  for (int i = 0; i < 6; ++i) *--words = nullptr;
  return static_cast<void*>(words);
}

#elif defined(SPECBRANCH_EMULATOR_AARCH64)

extern "C" __attribute__((visibility("hidden"))) void specbranch_switch_stack(void** saved, void* target);
asm(R"(
.text
.globl specbranch_switch_stack
.hidden specbranch_switch_stack
.type specbranch_switch_stack,%function
.p2align 4
specbranch_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size specbranch_switch_stack,.-specbranch_switch_stack
)");

inline void switch_stack(void** saved, void* target) { specbranch_switch_stack(saved, target); }

inline void* prepare_stack(char*, char* top, void (*f)()) {
  void** words = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15}) - 20;
  for (int i = 0; i < 20; ++i) words[i] = nullptr;
  words[11] = reinterpret_cast<void*>(f);  // x30, to which ret goes
  return static_cast<void*>(words);
}

#else

inline void switch_stack(void** saved, void* target) {
  ucontext_t here;
  *saved = &here;
  swapcontext(&here, static_cast<ucontext_t*>(target));
}

inline void* prepare_stack(char* bottom, char* top, void (*f)()) {
  const uintptr_t place = (reinterpret_cast<uintptr_t>(top) - sizeof(ucontext_t)) & ~uintptr_t{63};
  ucontext_t* context = reinterpret_cast<ucontext_t*>(place);
  getcontext(context);
  context->uc_stack.ss_sp = bottom;
  context->uc_stack.ss_size = reinterpret_cast<char*>(place) - bottom;
  context->uc_link = nullptr;
  makecontext(context, f, 0);
  return context;
}

#endif

}  // namespace specbranch::emulator

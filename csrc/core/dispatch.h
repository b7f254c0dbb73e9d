// Which kernel an op runs: the CPU one of the instruction-set level in use, or the CUDA one where it was built. Each
// op has a line of this in its own .cpp.
#pragma once

#include "core/isa.h"
#include "core/tensor.h"

// SPECBRANCH_DISPATCH defines run_<op>(params): calls cuda::<op>(params), or cpu::<level>::<op>(params) of the level in
// use. SPECBRANCH_CPU_KERNEL is its second half.
// clang-format off
#ifdef SPECBRANCH_X86
#define SPECBRANCH_CPU_KERNEL(op, Params)                     \
  namespace cpu {                                             \
  namespace baseline { void op(const Params&); }              \
  namespace avx2 { void op(const Params&); }                  \
  namespace avx512 { void op(const Params&); }                \
  inline void op(const Params& params) {                      \
    switch (isa()) {                                          \
      case Isa::amx:                                          \
      case Isa::bf16:                                         \
      case Isa::avx512: return avx512::op(params);            \
      case Isa::avx2: return avx2::op(params);                \
      default: return baseline::op(params);                   \
    }                                                         \
  }                                                           \
  }
#else
#define SPECBRANCH_CPU_KERNEL(op, Params)                     \
  namespace cpu {                                             \
  namespace baseline { void op(const Params&); }              \
  inline void op(const Params& params) { baseline::op(params); } \
  }
#endif

#if defined(SPECBRANCH_EMULATED)  // the CUDA kernels run on the CPU, and there is nothing else
#define SPECBRANCH_DISPATCH(op, Params)                       \
  namespace cuda { void op(const Params&); }                  \
  void run_##op(const Params& params) { cuda::op(params); }
#elif defined(SPECBRANCH_WITH_CUDA)
#define SPECBRANCH_DISPATCH(op, Params)                       \
  SPECBRANCH_CPU_KERNEL(op, Params)                           \
  namespace cuda { void op(const Params&); }                  \
  void run_##op(const Params& params) {                       \
    if (params.launch.on_cuda()) return cuda::op(params);     \
    cpu::op(params);                                          \
  }
#else
#define SPECBRANCH_DISPATCH(op, Params)                       \
  SPECBRANCH_CPU_KERNEL(op, Params)                           \
  void run_##op(const Params& params) {                       \
    if (params.launch.on_cuda()) fail("this build has no CUDA kernels: " SPECBRANCH_CUDA_REASON); \
    cpu::op(params);                                          \
  }
#endif

// The kernel of a cpu/bf16/ folder, where this build has one.
#if defined(SPECBRANCH_X86) || defined(SPECBRANCH_ARM_BF16)
#define SPECBRANCH_BF16_KERNEL(op, Params)                    \
  namespace cpu {                                             \
  namespace bf16 { void op(const Params&); }                  \
  inline bool op##_bf16(const Params& params) {               \
    if (isa() != Isa::bf16 || params.input.dtype != Dtype::bfloat16) return false; \
    bf16::op(params);                                         \
    return true;                                              \
  }                                                           \
  }
#else
#define SPECBRANCH_BF16_KERNEL(op, Params)                    \
  namespace cpu {                                             \
  inline bool op##_bf16(const Params&) { return false; }      \
  }
#endif

// The kernel of a cpu/amx/ folder, where this build has one.
#if defined(SPECBRANCH_AMX)
#define SPECBRANCH_AMX_KERNEL(op, Params)                     \
  namespace cpu {                                             \
  namespace amx { void op(const Params&); }                   \
  inline bool op##_amx(const Params& params) {                \
    if (isa() != Isa::amx || params.input.dtype != Dtype::bfloat16) return false; \
    amx::op(params);                                          \
    return true;                                              \
  }                                                           \
  }
#else
#define SPECBRANCH_AMX_KERNEL(op, Params)                     \
  namespace cpu {                                             \
  inline bool op##_amx(const Params&) { return false; }       \
  }
#endif

// An op without a CUDA kernel, and with those for bfloat16 instructions.
#if defined(SPECBRANCH_EMULATED)
#define SPECBRANCH_DISPATCH_CPU_BF16(op, Params)
#else
#define SPECBRANCH_DISPATCH_CPU_BF16(op, Params)              \
  SPECBRANCH_CPU_KERNEL(op, Params)                           \
  SPECBRANCH_BF16_KERNEL(op, Params)                          \
  SPECBRANCH_AMX_KERNEL(op, Params)                           \
  void run_##op(const Params& params) {                       \
    if (params.launch.on_cuda()) fail(#op " has no CUDA kernel: use torch's own"); \
    if (!cpu::op##_amx(params) && !cpu::op##_bf16(params)) cpu::op(params); \
  }
#endif
// clang-format on

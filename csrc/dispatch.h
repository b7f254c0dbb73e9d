// One function name, one implementation per instruction-set level.
#pragma once

#include "isa.h"

// Defines run_<op>(params): calls cpu::<level>::<op>(params) of the level in use.
#ifdef SPECBRANCH_X86
#define SPECBRANCH_DISPATCH(op, Params)                     \
  namespace cpu {                                           \
  namespace baseline { void op(const Params&); }            \
  namespace avx2 { void op(const Params&); }                \
  namespace avx512 { void op(const Params&); }              \
  }                                                         \
  void run_##op(const Params& params) {                     \
    switch (isa()) {                                        \
      case Isa::avx512: return cpu::avx512::op(params);     \
      case Isa::avx2: return cpu::avx2::op(params);         \
      default: return cpu::baseline::op(params);            \
    }                                                       \
  }
#else
#define SPECBRANCH_DISPATCH(op, Params)                     \
  namespace cpu::baseline { void op(const Params&); }       \
  void run_##op(const Params& params) { cpu::baseline::op(params); }
#endif

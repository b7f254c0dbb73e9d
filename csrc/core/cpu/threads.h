// The calling thread's number inside a parallel region.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "core/isa.h"

namespace specbranch::cpu::SPECBRANCH_ISA {

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace specbranch::cpu::SPECBRANCH_ISA

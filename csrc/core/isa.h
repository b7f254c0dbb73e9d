// What code is compiled for: instruction-set levels, and CUDA devices. Every file of a cpu/ folder is compiled once per
// level with SPECBRANCH_ISA set to the level's name, which is also the namespace of its code, so that the linker never
// mixes levels.
#pragma once

#ifndef SPECBRANCH_ISA
#define SPECBRANCH_ISA baseline
#endif

// Before a function that CUDA kernels call too.
#ifdef __CUDACC__
#define SPECBRANCH_HD __host__ __device__
#else
#define SPECBRANCH_HD
#endif

namespace specbranch {

enum class Isa { baseline, avx2, avx512 };

// The level in use: the best one this processor has, or a lower one named by the environment variable
// SPECBRANCH_ISA (read once). Throws std::invalid_argument for a level that cannot run here.
Isa isa();
const char* isa_name(Isa level);

}  // namespace specbranch

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

// `bf16`: the level before it, and products of bfloat16 and of 8 bits by the processor's own instructions (AVX512-BF16, VNNI,
// VBMI and VBMI2 on x86, FEAT_BF16 and FEAT_DotProd on Arm). Only the files of a cpu/bf16/ folder are compiled for it. `amx`: `bf16` of x86 and
// products in tiles, of bfloat16 and of 8 bits (AMX-TILE, AMX-BF16, AMX-INT8), for the files of a cpu/amx/ folder.
enum class Isa { baseline, avx2, avx512, bf16, amx };

// The level in use: the best one this processor has, or one named by the environment variable SPECBRANCH_ISA (read
// once). `amx` also needs the operating system, which is asked to grant tiles to this process. Throws
// std::invalid_argument for a level that cannot run here.
Isa isa();
const char* isa_name(Isa level);

}  // namespace specbranch

// What the CUDA kernels are written with, on a GPU (nvcc) and under the emulator (g++, csrc/emulator).
//
// Rules that keep both possible: shared memory comes from shared_memory<T>() only; kernels are launched by launch();
// PTX stays behind the wrappers of ptx.h; no CUB, cuRAND or cooperative groups; fused multiply-adds are asked for
// one by one with fmaf (the files are compiled with --fmad=false, because sampling must give the CPU's bits).
#pragma once

#include <cstdint>
#include <string>

#ifndef SPECBRANCH_EMULATED
#include <map>
#include <mutex>
#include <utility>
#endif

#include "core/bits.h"
#include "core/storage.h"
#include "core/tensor.h"

#ifdef SPECBRANCH_EMULATED
#include "emulator/cuda.h"
#ifndef __grid_constant__
#define __grid_constant__
#endif
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace specbranch::cuda {

constexpr int warp_size = 32;
constexpr unsigned all_lanes = 0xFFFFFFFFu;

// The block's dynamic shared memory, 16-byte aligned.
#ifdef SPECBRANCH_EMULATED
template <typename T>
T* shared_memory() {
  return static_cast<T*>(emulator::shared_memory());
}
#else
template <typename T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char specbranch_shared_memory[];
  return reinterpret_cast<T*>(specbranch_shared_memory);
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Allows a kernel so much dynamic shared memory on the current device. The limit is only ever raised: a captured graph
// may hold a launch of the same kernel that needs more than this one. To ask costs less than to set it once more.
inline void allow_shared_bytes(const void* kernel, int device, size_t bytes, const char* what) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), what);
  most = bytes;
}
#endif

// Runs `kernel` on the stream and device of `on`; throws std::runtime_error with the kernel's name when it cannot be
// launched. The default limit of 48 KiB of shared memory is raised when more is asked for.
template <typename... P, typename... A>
void launch(const char* name, void (*kernel)(P...), const Launch& on, dim3 grid, dim3 block, size_t shared_bytes,
            A&&... arguments) {
#ifdef SPECBRANCH_EMULATED
  (void)on;
  emulator::launch(name, grid, block, shared_bytes, [&] { kernel(static_cast<P>(arguments)...); });
#else
  int current = 0;
  check(cudaGetDevice(&current), name);
  if (current != on.device) check(cudaSetDevice(on.device), name);
  if (shared_bytes > 48 * 1024) {
    allow_shared_bytes(reinterpret_cast<const void*>(kernel), on.device, shared_bytes, name);
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(on.stream)>>>(static_cast<P>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  if (current != on.device) cudaSetDevice(current);
  check(error, name);
#endif
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

// Round to nearest, ties to even; NaN stays NaN.
template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline Bfloat16 from_float<Bfloat16>(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}
template <>
__device__ inline Float16 from_float<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

}  // namespace specbranch::cuda

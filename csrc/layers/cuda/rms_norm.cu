// A block for a row, or for several of those that a part of a warp can take at once. A thread owns eight neighbouring
// partial sums, of the squares of eight neighbouring elements at a time. Lower bound: the bytes of the rows once; the
// second pass finds them in the caches.
#include "layers/rms_norm.h"

#include "layers/cuda/eight.h"

namespace specbranch::cuda {
namespace {

constexpr int threads = 128;
static_assert(threads * eight == partial_sums, "a block owns all partial sums");

template <typename T>
struct Arguments {
  const T *input, *weight, *residual;  // residual: null where there is none
  T *output, *sum;
  int64_t rows, size;
  float eps;
  bool unit_offset, round_first;
  int row_threads;  // 8, 16 or 32, or all of the block's
};

// Adds the upper half of the first n to the lower, until one is left.
template <int n, int count>
__device__ inline void halve(float (&x)[count]) {
  if constexpr (n > 1) {
#pragma unroll
    for (int i = 0; i < n / 2; ++i) x[i] += x[i + n / 2];
    halve<n / 2>(x);
  }
}

// Of a row of some lanes' eight partial sums each; every one of them gets it.
__device__ float total_of_lanes(float (&partial)[eight], int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
    for (int e = 0; e < eight; ++e) partial[e] += __shfl_xor_sync(all_lanes, partial[e], step);
  }
  halve<eight>(partial);
  return partial[0];
}

// Of the block's; every warp adds all of them, which is faster than to wait for one that does.
__device__ float total_of_block(const float (&partial)[eight]) {
  constexpr int of_lane = partial_sums / warp_size;
  float* all = shared_memory<float>();
  float4* mine = reinterpret_cast<float4*>(all + threadIdx.x * eight);
  mine[0] = {partial[0], partial[1], partial[2], partial[3]};
  mine[1] = {partial[4], partial[5], partial[6], partial[7]};
  __syncthreads();
  float sums[of_lane];
#pragma unroll
  for (int i = 0; i < of_lane; ++i) sums[i] = all[i * warp_size + threadIdx.x % warp_size];
  halve<of_lane>(sums);
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) sums[0] += __shfl_xor_sync(all_lanes, sums[0], step);
  return sums[0];
}

template <typename T, bool vectors>
__global__ void __launch_bounds__(threads) rms_norm_kernel(const __grid_constant__ Arguments<T> a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (threads / a.row_threads) + threadIdx.x / a.row_threads;
  const int64_t first = threadIdx.x % a.row_threads * eight, start = row * a.size;
  const int64_t size = row < a.rows ? a.size : 0;  // lanes without a row take part in the sums of their warp

  float x[eight], partial[eight] = {};
  for (int64_t at = first; at < size; at += partial_sums) {
    load_eight<vectors>(a.input + start, at, size, x);
    if (a.residual != nullptr) {
      float added[eight];
      load_eight<vectors>(a.residual + start, at, size, added);
#pragma unroll
      for (int e = 0; e < eight; ++e) x[e] = round_to<T>(added[e] + x[e]);
      store_eight<vectors>(a.sum + start, at, size, x);
    }
#pragma unroll
    for (int e = 0; e < eight; ++e) partial[e] += x[e] * x[e];
  }
  const float total = a.row_threads == threads ? total_of_block(partial) : total_of_lanes(partial, a.row_threads);
  const float scale = 1.0f / sqrtf(total / static_cast<float>(a.size) + a.eps);

  const T* normed = (a.residual != nullptr ? a.sum : a.input) + start;  // of the sum what this thread has written
  for (int64_t at = first; at < size; at += partial_sums) {
    float weight[eight];
    load_eight<vectors>(normed, at, size, x);
    load_eight<vectors>(a.weight, at, size, weight);
#pragma unroll
    for (int e = 0; e < eight; ++e) {
      const float scaled = x[e] * scale;
      const float factor = a.unit_offset ? weight[e] + 1.0f : weight[e];
      x[e] = (a.round_first ? round_to<T>(scaled) : scaled) * factor;
    }
    store_eight<vectors>(a.output + start, at, size, x);
  }
}

template <typename T>
void norm_rows(const RmsNormParams& p, int64_t rows, int64_t size) {
  Arguments<T> a{p.input.as<const T>(),
                 p.weight.as<const T>(),
                 p.has_residual ? p.residual.as<const T>() : nullptr,
                 p.output.as<T>(),
                 p.has_residual ? p.sum.as<T>() : nullptr,
                 rows,
                 size,
                 static_cast<float>(p.eps),
                 p.unit_offset,
                 p.round_first,
                 threads};
  for (const int lanes : {warp_size, warp_size / 2, warp_size / 4}) {
    if (size <= lanes * eight) a.row_threads = lanes;
  }
  bool vectors = size % eight == 0;
  for (const void* data :
       {static_cast<const void*>(a.input), static_cast<const void*>(a.weight), static_cast<const void*>(a.residual),
        static_cast<const void*>(a.output), static_cast<const void*>(a.sum)}) {
    vectors = vectors && takes_vectors(data, size, sizeof(T));
  }
  const int64_t blocks = divide_up(rows, threads / a.row_threads);
  if (blocks > INT32_MAX) fail("input: expected at most 2^31 - 1 rows, got " + shape_text(p.input));
  const size_t shared_bytes = a.row_threads == threads ? partial_sums * sizeof(float) : 0;
  launch("rms_norm", vectors ? rms_norm_kernel<T, true> : rms_norm_kernel<T, false>, p.launch,
         dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, a);
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  const int64_t size = p.input.shape[p.input.dims - 1];
  int64_t rows = 1;
  for (int i = 0; i + 1 < p.input.dims; ++i) rows *= p.input.shape[i];
  if (rows == 0 || size == 0) return;
  switch (p.input.dtype) {
    case Dtype::float32: return norm_rows<float>(p, rows, size);
    case Dtype::bfloat16: return norm_rows<Bfloat16>(p, rows, size);
    default: return norm_rows<Float16>(p, rows, size);
  }
}

}  // namespace specbranch::cuda

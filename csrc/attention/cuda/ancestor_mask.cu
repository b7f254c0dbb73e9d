// One thread per node climbs to its root through the parents, which the block has brought into shared memory: the
// climb is a chain of dependent loads. Only bits of the thread's own row are written, so nothing needs to be atomic.
//
// A parent that is not an earlier node cannot raise here: the node and everything below it get no bits and depth -1.
#include "attention/ancestor_mask.h"

#include "core/cuda/device.h"

namespace specbranch::cuda {
namespace {

constexpr int threads = 128;
constexpr int64_t max_shared_parents = 48 * 1024 / sizeof(int64_t);

__global__ void __launch_bounds__(threads)
    ancestor_mask_kernel(const int64_t* parents, int64_t n, int64_t words, uint64_t* ancestors, int64_t* depths) {
  const int64_t node = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (n <= max_shared_parents) {
    int64_t* staged = shared_memory<int64_t>();
    for (int64_t i = threadIdx.x; i < n; i += threads) staged[i] = parents[i];
    __syncthreads();
    parents = staged;
  }
  if (node >= n) return;
  uint64_t* row = ancestors + node * words;
  int64_t depth = -1, at = node;
  bool valid = true;
  for (int64_t w = words - 1; w >= 0; --w) {
    uint64_t bits = 0;
    while (valid && at >= w * 64) {  // ancestors come in falling order, so each word is written once
      bits |= uint64_t{1} << (at - w * 64);
      ++depth;
      const int64_t parent = parents[at];
      valid = parent >= -1 && parent < at;
      at = parent;
    }
    row[w] = bits;
  }
  depths[node] = valid ? depth : -1;
  if (valid) return;
  for (int64_t w = 0; w < words; ++w) row[w] = 0;
}

}  // namespace

void ancestor_mask(const AncestorMaskParams& p) {
  const int64_t n = p.parents.shape[0];
  if (n == 0) return;
  const size_t shared_bytes = n <= max_shared_parents ? n * sizeof(int64_t) : 0;
  launch("ancestor_mask", ancestor_mask_kernel, p.launch, dim3(static_cast<unsigned>(divide_up(n, threads))),
         dim3(threads), shared_bytes, p.parents.as<const int64_t>(), n, p.ancestors.shape[1],
         p.ancestors.as<uint64_t>(), p.depths.as<int64_t>());
}

}  // namespace specbranch::cuda

// verify in two launches. The first finds the largest logits of the rows' pieces (row_max.h). The second is one block
// at temperature 0: it merges them and walks the tree. Otherwise it samples the rows (row_sampler.h), and the block
// that ends last walks the tree (tree_walk.h).
//
// A row with NaN, +inf, only -inf or an overflow cannot raise here: its target token is -1 and, unless its node is
// unused, next_token is -1, with nothing accepted.
#include "verify.h"

#include "cuda/row_sampler.h"
#include "cuda/row_sampler_launch.h"
#include "cuda/tree_walk.h"

namespace specbranch::cuda {
namespace {

// width: lanes for a row, a power of two.
__global__ void __launch_bounds__(sampler_threads)
    verify_greedy_kernel(const Word64* maxima, int pieces, int width, const TreeArguments tree) {
  const int rows_at_once = sampler_threads / width;
  const int lane = static_cast<int>(threadIdx.x) % width;
  for (int64_t base = 0; base < tree.n; base += rows_at_once) {
    const int64_t row = base + static_cast<int>(threadIdx.x) / width;
    Word64 best = 0;
    for (int i = lane; i < pieces && row < tree.n; i += width) best = larger(best, maxima[row * pieces + i]);
    for (int offset = width / 2; offset > 0; offset /= 2) {
      best = larger(best, __shfl_xor_sync(all_lanes, best, offset));
    }
    if (lane == 0 && row < tree.n) tree.target_tokens[row] = usable(best, 1.0f) ? key_token(best) : -1;
  }
  __syncthreads();
  walk_tree<sampler_threads>(tree, *shared_memory<WalkShared>());
}

struct VerifyShared {
  SamplerShared<BestOne> sampler;
  WalkShared walk;
  bool is_last;
};

template <typename T>
__global__ void __launch_bounds__(sampler_threads)
    verify_kernel(const SampleArguments arguments, const TreeArguments tree, unsigned* rows_done) {
  VerifyShared& shared = *shared_memory<VerifyShared>();
  RowSampler<T, BestOne, /*statistics=*/false> sampler(arguments, shared.sampler, BestOne(shared.sampler.best), 1);
  if (!sampler.run()) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    tree.target_tokens[sampler.row_index()] = sampler.is_usable() ? key_token(sampler.best().best()) : -1;
    __threadfence();
    shared.is_last = atomicAdd(rows_done, 1u) == static_cast<unsigned>(tree.n) - 1u;
    __threadfence();
  }
  __syncthreads();
  if (shared.is_last) walk_tree<sampler_threads>(tree, shared.walk);
}

template <typename T>
void run(const VerifyParams& p) {
  const int64_t n = p.target_logits.shape[0], vocabulary = p.target_logits.shape[1];
  const Filters& f = p.filters;
  const SampleWorkspace workspace(p.launch.workspace, n, vocabulary, /*many_k=*/0, f);
  const TreeArguments tree{n,
                           p.tokens.as<const int64_t>(),
                           p.parents.as<const int64_t>(),
                           p.target_tokens.as<int64_t>(),
                           p.path.as<int64_t>(),
                           p.accepted.as<int64_t>(),
                           p.next_token.as<int64_t>()};
  const Pieces max_pieces = launch_row_max<T>("verify", p.launch, p.target_logits, f, workspace);
  if (f.greedy()) {
    int width = 1;
    while (width < max_pieces.count && width < warp_size) width *= 2;
    launch("verify", verify_greedy_kernel, p.launch, dim3(1), dim3(sampler_threads), sizeof(WalkShared),
           workspace.maxima, max_pieces.count, width, tree);
    return;
  }
  const SampleArguments arguments = sample_arguments(p.target_logits, p.positions, p.seed, f, workspace);
  launch("verify", verify_kernel<T>, p.launch, dim3(static_cast<unsigned>(n * arguments.pieces)),
         dim3(sampler_threads), sizeof(VerifyShared), arguments, tree, workspace.rows_done);
}

}  // namespace

int64_t verify_workspace(int64_t rows, int64_t vocabulary, const Filters& filters) {
  return SampleWorkspace(nullptr, rows, vocabulary, /*many_k=*/0, filters).bytes;
}

void verify(const VerifyParams& p) {
  switch (p.target_logits.dtype) {
    case Dtype::bfloat16: return run<Bfloat16>(p);
    case Dtype::float16: return run<Float16>(p);
    default: return run<float>(p);
  }
}

}  // namespace specbranch::cuda

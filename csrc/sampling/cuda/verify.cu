// verify at temperature 0 is one launch: its blocks find the largest logits of the rows' segments (row_max.h), and the
// one that ends last merges them and walks the tree (tree_walk.h). Otherwise a second launch samples the rows
// (row_sampler.h), and its last block walks. With the filters in memory there are always two launches, and only one of
// them walks: the first at temperature 0, else the second. It is the second too where each row has filters of its own.
//
// Lower bound at temperature 0: the logits' bytes once. On an H100, 9 rows of 151,936 bfloat16 logits should take
// 4.5 us: 2 for the launch, 1 for the bytes (2.7 MB, all loads in flight at once), and 1.5 for the end, which is four
// round trips to the L2 cache: the ticket, the segments' maxima, and the walk's target tokens and results.
//
// A row with NaN, +inf, only -inf or an overflow cannot raise here: its target token is -1 and, unless its node is
// unused, its text's next_token is -1, with nothing accepted. Nor can filters out of range: the rows that they are for
// are such rows.
#include "sampling/verify.h"

#include "core/cuda/tickets.h"
#include "sampling/cuda/launch.h"
#include "sampling/cuda/row_sampler.h"
#include "sampling/cuda/tree_walk.h"

namespace specbranch::cuda {
namespace {

struct GreedyShared {
  RowMaxShared max;
  WalkShared walk;
  bool is_last;
};

// Lanes that merge a row's maxima, a power of two: so few that the rows are merged all at once, if possible.
int merging_lanes(int64_t rows, int32_t segments) {
  int lanes = 1;
  while (lanes < segments && lanes < warp_size && 2 * lanes * rows <= row_max_threads) lanes *= 2;
  return lanes;
}

// Blocks that a multiprocessor must hold at least; 0: as many as the compiler likes. With a mask that would be so many
// that registers spill.
template <typename Row>
constexpr int least_greedy_blocks = Row::is_masked ? 6 : 0;
template <typename Row>
constexpr int least_sampler_blocks = Row::is_masked ? 1 : 0;

// The whole of temperature 0. With filters in memory for all rows, above 0, the first launch.
template <typename Row>
__global__ void __launch_bounds__(row_max_threads, least_greedy_blocks<Row>)
    verify_greedy_kernel(const RowMaxArguments a, const TreeArguments tree, int row_lanes, unsigned* ticket) {
  GreedyShared& shared = *shared_memory<GreedyShared>();
  find_row_max<Row>(a, shared.max);
  if (a.filters.first != nullptr && !shared.max.greedy) return;
  if (threadIdx.x == 0) shared.is_last = takes_last_ticket(ticket, gridDim.x);
  __syncthreads();
  if (!shared.is_last) return;

  const int lane = static_cast<int>(threadIdx.x) % row_lanes;
  for (int64_t base = 0; base < tree.n; base += row_max_threads / row_lanes) {
    const int64_t row = base + static_cast<int>(threadIdx.x) / row_lanes;
    const int32_t segments = row < tree.n ? a.segments : 0;
    Word64 best = 0;
#pragma unroll 4
    for (int32_t i = lane; i < segments; i += row_lanes) best = larger(best, a.maxima[row * a.segments + i]);
    for (int offset = row_lanes / 2; offset > 0; offset /= 2) {
      best = larger(best, __shfl_xor_sync(all_lanes, best, offset));
    }
    if (lane == 0 && row < tree.n) tree.target_tokens[row] = usable(best, 1.0f) ? key_token(best) : -1;
  }
  __syncthreads();
  walk<row_max_threads>(tree, shared.walk);
}

struct VerifyShared {
  SamplerShared<BestOne> sampler;
  WalkShared walk;
  bool is_last;
};

template <typename Row, bool filters_in_memory>
__global__ void __launch_bounds__(sampler_threads, least_sampler_blocks<Row>)
    verify_kernel(const SampleArguments arguments, const TreeArguments tree, unsigned* ticket) {
  VerifyShared& shared = *shared_memory<VerifyShared>();
  const RowFilters& filters = row_filters<filters_in_memory>(arguments, shared.sampler.filters);
  if (filters_in_memory && !arguments.filters_in_memory.by_row && filters.greedy) return;  // the first launch walked
  RowSampler<Row, BestOne, /*statistics=*/false> sampler(arguments, filters, shared.sampler,
                                                         BestOne(shared.sampler.best), 1);
  if (!sampler.run()) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    tree.target_tokens[sampler.row_index()] = sampler.is_usable() ? key_token(sampler.best().best()) : -1;
    shared.is_last = takes_last_ticket(ticket, static_cast<unsigned>(tree.n));
  }
  __syncthreads();
  if (shared.is_last) walk<sampler_threads>(tree, shared.walk);
}

template <typename Row>
void run(const VerifyParams& p) {
  const int64_t n = p.target_logits.shape[0], vocabulary = p.target_logits.shape[1];
  const Filters& f = p.filters;
  const FiltersInMemory& in_memory = p.filters_in_memory;
  const bool any_filters = in_memory.first != nullptr;
  const SampleWorkspace workspace(p.launch.workspace, n, vocabulary, /*many_k=*/0, f, any_filters);
  const TreeArguments tree{n,
                           p.has_roots,
                           p.has_roots ? p.roots.shape[0] : 1,
                           p.roots.as<const int64_t>(),
                           p.tokens.as<const int64_t>(),
                           p.parents.as<const int64_t>(),
                           p.target_tokens.as<int64_t>(),
                           p.path.as<int64_t>(),
                           p.accepted.as<int64_t>(),
                           p.next_token.as<int64_t>()};
  const AllowedRows allowed(p.allowed);
  const RowMaxArguments max_arguments = row_max_arguments(p.target_logits, allowed, f, in_memory, workspace);
  if (any_filters ? !in_memory.by_row : f.greedy()) {
    launch("verify", verify_greedy_kernel<Row>, p.launch, dim3(static_cast<unsigned>(n * max_arguments.segments)),
           dim3(row_max_threads), sizeof(GreedyShared), max_arguments, tree, merging_lanes(n, max_arguments.segments),
           p.launch.tickets);
    if (!any_filters) return;
  } else {
    launch_row_max<Row>("verify", p.launch, n, max_arguments);
  }
  const SampleArguments arguments =
      sample_arguments(p.target_logits, allowed, p.positions, p.seed, f, in_memory, workspace);
  const auto kernel = any_filters ? verify_kernel<Row, true> : verify_kernel<Row, false>;
  launch("verify", kernel, p.launch, dim3(static_cast<unsigned>(n * arguments.segments)), dim3(sampler_threads),
         sizeof(VerifyShared), arguments, tree, p.launch.tickets);
}

}  // namespace

int64_t verify_workspace(int64_t rows, int64_t vocabulary, const Filters& filters, bool any_filters) {
  return SampleWorkspace(nullptr, rows, vocabulary, /*many_k=*/0, filters, any_filters).bytes;
}

void verify(const VerifyParams& p) {
  with_row_type(p.target_logits.dtype, p.has_allowed, [&](auto type) { run<typename decltype(type)::Row>(p); });
}

}  // namespace specbranch::cuda

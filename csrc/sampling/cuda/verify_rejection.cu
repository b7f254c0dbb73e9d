// verify_rejection (see verify_rejection.h for the arithmetic) in three launches, because each needs what the one
// before found in whole rows: the weights need the largest logit, the residual the sums of the weights. Between
// launches travel a few numbers for each row; nothing of the logits' size is written.
//
//   1. max_kernel: the largest logit of each segment of all 2n - 1 rows (row_max.h).
//   2. weigh_kernel: the threshold of the filters and the sum of the weights that they keep (row_sampler.h, without
//      noise, so that its only candidate is the largest logit).
//   3. residual_kernel: each block works out the chances of the chain, a few numbers, and sums the residual of its
//      segment: of one row token-wise, and of every row for block verification, whose coins need the sums. The block
//      that ends last tosses those coins and draws: from the segments' sums it knows which segment to look at.
// At temperature 0 the largest logits decide and greedy_kernel replaces the last two.
//
// Lower bound: the logits' bytes once from memory and twice more from the L2 cache (token-wise the third pass reads two
// rows).
//
// A row with NaN, +inf, only -inf or an overflow cannot raise here: where the chain has one, next_token is -1, with
// nothing accepted.
#include "sampling/verify_rejection.h"

#include <climits>

#include "core/cuda/tickets.h"
#include "sampling/cuda/launch.h"
#include "sampling/cuda/row_sampler.h"

namespace specbranch::cuda {
namespace {

using namespace rejection;

constexpr int64_t max_rows = 1024;  // of the target: what a block holds of every row stays below 48 KiB
constexpr int residual_threads = 256;
constexpr int residual_warps = residual_threads / warp_size;
constexpr int greedy_threads = 256;

// A row as the last launch sees it, written by the second.
struct RowInfo {
  Word64 sum;  // of the kept tokens' weights
  float z_max, threshold;
  int32_t argmax;
  int32_t usable;
};

// What the chain's walk needs. Rows are the target's, then the draft's: 2n - 1.
struct Arguments {
  const void *target, *draft;
  int64_t target_stride, draft_stride;
  AllowedRows allowed;  // of both
  const int64_t *tokens, *positions, *seed;
  int64_t *accepted, *next_token;
  int32_t n, vocabulary;
  float inverse_temperature, min_p;
  bool block;
  int32_t max_segments, residual_segments, residual_groups;
  // Workspace.
  const Word64* maxima;  // [rows, max_segments]: keys of the largest logits
  RowInfo* info;         // [rows]
  Word64* parts;         // [n, residual_segments], or one row of them token-wise
  unsigned* ticket;      // of the last launch's blocks

  template <typename Row>
  __device__ Row row(int32_t i) const {
    return i < n ? Row(target, target_stride, allowed, i, vocabulary)
                 : Row(draft, draft_stride, allowed, i - n, vocabulary);
  }
  __device__ NoiseKey key(int32_t i) const {
    return {static_cast<uint64_t>(*seed), static_cast<uint64_t>(positions[i])};
  }
};

// ---- The first two launches: row_max.h and row_sampler.h for the rows of both tensors. Blocks from first_of_draft on
// read the draft, through a pointer that makes its first row number n.

template <typename Row>
__global__ void __launch_bounds__(row_max_threads)
    max_kernel(const __grid_constant__ RowMaxArguments target, const __grid_constant__ RowMaxArguments draft,
               unsigned first_of_draft) {
  find_row_max<Row>(blockIdx.x < first_of_draft ? target : draft, *shared_memory<RowMaxShared>());
}

template <typename Row>
__global__ void __launch_bounds__(sampler_threads)
    weigh_kernel(const __grid_constant__ SampleArguments target, const __grid_constant__ SampleArguments draft,
                 unsigned first_of_draft, RowInfo* info) {
  using Sampler = RowSampler<Row, BestOne, /*statistics=*/true>;
  typename Sampler::Shared& shared = *shared_memory<typename Sampler::Shared>();
  const SampleArguments& a = blockIdx.x < first_of_draft ? target : draft;
  Sampler sampler(a, a.filters, shared, BestOne(shared.best), 1);
  if (!sampler.run() || threadIdx.x != 0) return;
  info[sampler.row_index()] = {sampler.kept(), sampler.z_max(), sampler.threshold(), key_token(shared.max_key),
                               sampler.is_usable() ? 1 : 0};
}

// ---- The last launch.

struct ResidualShared {
  Word64 warps[residual_warps];
  Word64 left;  // of the uniform integer, in the segment
  int drafted, drawn, accepted, segment;
  bool unusable, is_last;
  // Then of every row of the target: one over the sum of its weights; of its drafted token q of the target, and D; and
  // the chance of the path with that token.
};
__host__ __device__ inline size_t residual_shared_bytes(int64_t n) {
  return sizeof(ResidualShared) + 4 * sizeof(double) * static_cast<size_t>(n);
}

// floor(2^40 * exp(z - z_max)) of a token that the filters keep, 0 for the others; exactly.
__device__ inline double weight_of(float logit, const RowInfo& info, const Arguments& a) {
  const float z = logit * a.inverse_temperature;
  const float w = exp_nonpositive(z - info.z_max);
  if (!(z >= info.threshold && w >= a.min_p)) return 0.0;
  const FixedPoint q(w);
  // Both digits and their sum fit a float: it has the 24 bits of w.
  return static_cast<double>(static_cast<float>(q.high) * two_to_20 + static_cast<float>(q.low));
}

// The number of tokens before the first that is no token of the vocabulary. By all threads; s.drafted starts as n - 1.
__device__ inline int drafted_tokens(const Arguments& a, int& drafted) {
  for (int i = static_cast<int>(threadIdx.x); i < a.n - 1; i += static_cast<int>(blockDim.x)) {
    const int64_t token = a.tokens[i + 1];
    if (token < 0 || token >= a.vocabulary) atomicMin(&drafted, i);
  }
  __syncthreads();
  return drafted;
}

// A row of the residual.
template <typename Row>
struct Residual {
  Row target, draft;
  RowInfo target_info, draft_info;
  double target_scale, draft_scale;
};

// The residual's weights, four tokens for each call of next(): the groups of a GroupReader.
template <typename Row>
class ResidualReader {
 public:
  __device__ ResidualReader(const Arguments& a, const Residual<Row>& residual, int32_t first, int32_t end)
      : a_(a), r_(residual), target_(residual.target, first, end), draft_(residual.draft, first, end) {}

  __device__ void next(Word64 (&weight)[group_tokens]) {
    const Group t = target_.next(), d = draft_.next();
#pragma unroll
    for (int j = 0; j < group_tokens; ++j) {
      weight[j] = residual_weight(r_.target_scale * weight_of(t.x[j], r_.target_info, a_),
                                  r_.draft_scale * weight_of(d.x[j], r_.draft_info, a_));
    }
  }

 private:
  const Arguments& a_;
  const Residual<Row>& r_;
  GroupReader<Row, residual_threads> target_, draft_;
};

template <typename Row>
__global__ void __launch_bounds__(residual_threads) residual_kernel(const __grid_constant__ Arguments a) {
  ResidualShared& s = *shared_memory<ResidualShared>();
  double* share = reinterpret_cast<double*>(&s + 1);
  double *target_weight = share + a.n, *draft_chance = target_weight + a.n, *path = draft_chance + a.n;
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t block_row = static_cast<int32_t>(blockIdx.x) / a.residual_segments;
  const int32_t segment = static_cast<int32_t>(blockIdx.x) % a.residual_segments;

  if (thread == 0) {
    s.drafted = a.n - 1;
    s.drawn = INT_MAX;
    s.accepted = a.block ? 0 : INT_MAX;
    s.unusable = false;
  }
  __syncthreads();
  const int drafted = drafted_tokens(a, s.drafted);
  for (int i = thread; i <= drafted; i += residual_threads) {
    const RowInfo& info = a.info[i];
    if (info.usable == 0) s.unusable = true;
    share[i] = 1.0 / static_cast<double>(info.sum);
    if (i == drafted) continue;
    const RowInfo& draft_info = a.info[a.n + i];
    if (draft_info.usable == 0) s.unusable = true;
    const int32_t token = static_cast<int32_t>(a.tokens[i + 1]);
    target_weight[i] = weight_of(a.row<Row>(i)[token], info, a);
    draft_chance[i] = 1.0 / static_cast<double>(draft_info.sum) * weight_of(a.row<Row>(a.n + i)[token], draft_info, a);
    if (!(draft_chance[i] > 0.0)) atomicMin(&s.drawn, i);
  }
  __syncthreads();
  if (s.unusable) {
    if (blockIdx.x == 0 && thread == 0) {
      *a.accepted = 0;
      *a.next_token = -1;
    }
    return;
  }
  const int drawn = min(s.drawn, drafted);

  // The chances of the path.
  if (a.block) {
    if (thread == 0) {
      double scale = share[0];
      for (int i = 0; i < drawn; ++i) {
        path[i] = path_chance(scale * target_weight[i], draft_chance[i]);
        scale = share[i + 1] * path[i];
      }
    }
  } else {
    for (int i = thread; i < drawn; i += residual_threads) {
      const double chance = path_chance(share[i] * target_weight[i], draft_chance[i]);
      if (!says_yes(random_integer(a.key(0), i, Purpose::accept), chance)) atomicMin(&s.accepted, i);
    }
  }
  __syncthreads();

  const auto residual_of = [&](int32_t i) {
    const bool against = i < drawn;  // else the target's own row, times 0
    const double scale = a.block && against && i > 0 ? share[i] * path[i - 1] : share[i];
    const int32_t other = against ? a.n + i : i;
    return Residual<Row>{a.row<Row>(i), a.row<Row>(other),
                         a.info[i],     a.info[other],
                         scale,         against ? 1.0 / static_cast<double>(a.info[other].sum) : 0.0};
  };
  const int32_t row_index = a.block ? block_row : min(s.accepted, drawn);
  const int32_t groups = (a.vocabulary - 1) / group_tokens + 1;
  Word64 sum = 0;
  if (row_index <= drawn) {
    const Residual<Row> residual = residual_of(row_index);
    const int32_t begin = segment * a.residual_groups, end = min(begin + a.residual_groups, groups);
    ResidualReader<Row> reader(a, residual, begin + thread, end);
    for (int32_t base = begin; base < end; base += residual_threads) {
      Word64 weight[group_tokens];
      reader.next(weight);
#pragma unroll
      for (const Word64 w : weight) sum += w;
    }
  }
  sum = warp_sum(sum);
  if (lane_index() == 0) s.warps[warp_index()] = sum;
  __syncthreads();
  if (thread == 0) {
    sum = 0;
    for (const Word64 w : s.warps) sum += w;
    a.parts[blockIdx.x] = sum;
    s.is_last = takes_last_ticket(a.ticket, gridDim.x);
  }
  __syncthreads();
  if (!s.is_last) return;

  // How many tokens are accepted, by block verification.
  if (a.block) {
    for (int i = 1 + warp_index(); i <= drawn; i += residual_warps) {
      Word64 row_sum = 0;
      for (int p = lane_index(); p < a.residual_segments; p += warp_size) {
        row_sum += __ldcg(a.parts + static_cast<int64_t>(i) * a.residual_segments + p);
      }
      row_sum = warp_sum(row_sum);
      if (lane_index() != 0) continue;
      const double chance = i == drawn ? path[i - 1] : block_chance(row_sum, path[i - 1]);
      if (says_yes(random_integer(a.key(0), i - 1, Purpose::accept), chance)) atomicMax(&s.accepted, i);
    }
    __syncthreads();
  }
  const int accepted = a.block ? s.accepted : row_index;

  // Which segment the uniform integer falls into. There are no more segments than threads.
  const Word64* parts = a.parts + (a.block ? static_cast<int64_t>(accepted) * a.residual_segments : 0);
  const auto sum_through = [&](Word64 value, Word64& all) {  // of all threads' values up to this one's
    Word64 through = warp_inclusive_sum(value);
    __syncthreads();
    if (lane_index() == warp_size - 1) s.warps[warp_index()] = through;
    __syncthreads();
    all = 0;
    for (int w = 0; w < residual_warps; ++w) {
      if (w < warp_index()) through += s.warps[w];
      all += s.warps[w];
    }
    return through;
  };
  const Word64 part = thread < a.residual_segments ? __ldcg(parts + thread) : 0;
  Word64 all = 0;
  const Word64 through = sum_through(part, all);
  if (thread == 0) *a.accepted = accepted;
  if (all == 0) {  // draft and target are equal, so the rejection was rounding
    if (thread == 0) *a.next_token = a.info[accepted].argmax;
    return;
  }
  const Word64 uniform = below(all, random_integer(a.key(accepted), 0, Purpose::residual));
  if (uniform < through && uniform >= through - part) {
    s.segment = thread;
    s.left = uniform - (through - part);
  }
  __syncthreads();

  const Residual<Row> residual = residual_of(accepted);
  Word64 left = s.left;
  const int32_t begin = s.segment * a.residual_groups, end = min(begin + a.residual_groups, groups);
  ResidualReader<Row> reader(a, residual, begin + thread, end);
  for (int32_t base = begin; base < end; base += residual_threads) {
    Word64 weight[group_tokens];
    reader.next(weight);
    const Word64 mine = weight[0] + weight[1] + weight[2] + weight[3];
    const Word64 group_through = sum_through(mine, all);
    if (left < group_through && left >= group_through - mine) {
      Word64 rest = left - (group_through - mine);
      int32_t token = group_tokens * (base + thread);
#pragma unroll
      for (int j = 0; j < group_tokens - 1; ++j) {
        if (rest < weight[j]) break;
        rest -= weight[j];
        ++token;
      }
      *a.next_token = token;
    }
    if (left < all) return;
    left -= all;
  }
}

// ---- Temperature 0.

// By one warp: the key of a row's largest logit.
__device__ inline Word64 row_key(const Arguments& a, int32_t row_index) {
  const Word64* maxima = a.maxima + static_cast<int64_t>(row_index) * a.max_segments;
  Word64 key = 0;
  for (int i = lane_index(); i < a.max_segments; i += warp_size) key = larger(key, maxima[i]);
  return warp_max(key);
}

__global__ void __launch_bounds__(greedy_threads) greedy_kernel(const __grid_constant__ Arguments a) {
  int* shared = shared_memory<int>();  // the tokens drafted, those accepted, whether a row is unusable
  int &drafted = shared[0], &accepted = shared[1], &unusable = shared[2];
  if (threadIdx.x == 0) {
    drafted = a.n - 1;
    accepted = INT_MAX;
    unusable = 0;
  }
  __syncthreads();
  drafted_tokens(a, drafted);
  for (int i = warp_index(); i <= drafted; i += greedy_threads / warp_size) {
    const Word64 key = row_key(a, i), draft_key = i < drafted ? row_key(a, a.n + i) : key;
    if (lane_index() != 0) continue;
    if (!usable(key, 1.0f) || !usable(draft_key, 1.0f)) unusable = 1;
    const bool accepts = i < drafted && a.tokens[i + 1] == key_token(key) && a.tokens[i + 1] == key_token(draft_key);
    if (!accepts) atomicMin(&accepted, i);
  }
  __syncthreads();
  if (warp_index() != 0) return;
  const Word64 key = row_key(a, accepted);
  if (lane_index() != 0) return;
  *a.accepted = unusable != 0 ? 0 : accepted;
  *a.next_token = unusable != 0 ? -1 : key_token(key);
}

// ---- Host.

// Segments of the last launch: no more than it has threads.
Segments residual_segments(int64_t n, int64_t vocabulary, bool block) {
  return Segments(block ? n : 1, vocabulary, /*wanted_blocks=*/(block ? 4 : 1) * 132, /*min_tokens=*/1024,
                  residual_threads);
}

// The workspace of the first two launches, then what the last one needs.
struct RejectionWorkspace : Workspace<256> {
  SampleWorkspace rows;
  RowInfo* info = nullptr;
  Word64* parts = nullptr;

  RejectionWorkspace(void* memory, int64_t n, int64_t vocabulary, const Filters& filters)
      : Workspace(memory), rows(memory, 2 * n - 1, vocabulary, /*many_k=*/0, filters, /*any_filters=*/false) {
    bytes = rows.bytes;
    if (filters.greedy() || n < 1) return;
    parts = take<Word64>(n * residual_threads);
    info = take<RowInfo>(2 * n - 1);
  }
};

// Where rows for the draft would begin if the first one were number n.
const void* behind_the_target(const Tensor& rows, int64_t n) {
  return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(rows.data) -
                                       static_cast<uintptr_t>(n * rows.stride[0] * rows.item_bytes));
}

template <typename Row>
void run(const VerifyRejectionParams& p) {
  const int64_t n = p.target_logits.shape[0], vocabulary = p.target_logits.shape[1], rows = 2 * n - 1;
  const Filters& f = p.filters;
  const RejectionWorkspace workspace(p.launch.workspace, n, vocabulary, f);
  const void* draft_rows = behind_the_target(p.draft_logits, n);
  const AllowedRows allowed(p.allowed);
  AllowedRows allowed_in_draft = allowed;
  if (p.has_allowed) allowed_in_draft.first = static_cast<const uint32_t*>(behind_the_target(p.allowed, n));
  const auto blocks = [](int64_t count) { return static_cast<unsigned>(count); };

  Tensor all_rows = p.target_logits, no_positions = p.positions;
  all_rows.shape[0] = rows;
  no_positions.data = workspace.rows.maxima;  // there are fewer positions than rows, and nothing is drawn for them

  const RowMaxArguments max_target = row_max_arguments(all_rows, allowed, f, /*in_memory=*/{}, workspace.rows);
  RowMaxArguments max_draft = max_target;
  max_draft.logits = draft_rows;
  max_draft.stride = p.draft_logits.stride[0];
  max_draft.allowed = allowed_in_draft;
  launch("verify_rejection", max_kernel<Row>, p.launch, dim3(blocks(rows * max_target.segments)), dim3(row_max_threads),
         sizeof(RowMaxShared), max_target, max_draft, blocks(n * max_target.segments));

  const Segments segments = residual_segments(n, vocabulary, p.block);
  const Arguments a{p.target_logits.data,
                    p.draft_logits.data,
                    p.target_logits.stride[0],
                    p.draft_logits.stride[0],
                    allowed,
                    p.tokens.as<const int64_t>(),
                    p.positions.as<const int64_t>(),
                    p.seed.as<const int64_t>(),
                    p.accepted.as<int64_t>(),
                    p.next_token.as<int64_t>(),
                    static_cast<int32_t>(n),
                    static_cast<int32_t>(vocabulary),
                    f.inverse_temperature(),
                    static_cast<float>(f.min_p),
                    p.block,
                    max_target.segments,
                    segments.count,
                    segments.groups,
                    workspace.rows.maxima,
                    workspace.info,
                    workspace.parts,
                    p.launch.tickets};
  if (f.greedy()) {
    launch("verify_rejection", greedy_kernel, p.launch, dim3(1), dim3(greedy_threads), 3 * sizeof(int), a);
    return;
  }

  SampleArguments weigh_target =
      sample_arguments(all_rows, allowed, no_positions, p.seed, f, /*in_memory=*/{}, workspace.rows);
  weigh_target.filters.greedy = true;  // no noise
  SampleArguments weigh_draft = weigh_target;
  weigh_draft.logits = draft_rows;
  weigh_draft.stride = p.draft_logits.stride[0];
  weigh_draft.allowed = allowed_in_draft;
  launch("verify_rejection", weigh_kernel<Row>, p.launch, dim3(blocks(rows * weigh_target.segments)),
         dim3(sampler_threads), sizeof(SamplerShared<BestOne>), weigh_target, weigh_draft,
         blocks(n * weigh_target.segments), workspace.info);
  launch("verify_rejection", residual_kernel<Row>, p.launch, dim3(blocks((p.block ? n : 1) * segments.count)),
         dim3(residual_threads), residual_shared_bytes(n), a);
}

}  // namespace

int64_t verify_rejection_workspace(int64_t n, int64_t vocabulary, const Filters& filters) {
  return RejectionWorkspace(nullptr, n, vocabulary, filters).bytes;
}

void verify_rejection(const VerifyRejectionParams& p) {
  if (p.target_logits.shape[0] > max_rows) {
    fail("target_logits: expected at most 1024 rows on a CUDA device, got " + shape_text(p.target_logits));
  }
  with_row_type(p.target_logits.dtype, p.has_allowed, [&](auto type) { run<typename decltype(type)::Row>(p); });
}

}  // namespace specbranch::cuda

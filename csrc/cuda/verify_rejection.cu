// verify_rejection (see verify_rejection.h for the arithmetic) in three launches, because each needs what the one before
// found in whole rows: the weights need the largest logit, the residual the sums of the weights. Between launches travel
// a few numbers for each row; nothing of the logits' size is written.
//
//   1. max_kernel: the largest logit of each piece of all 2n - 1 rows.
//   2. weigh_kernel: the sum of the weights that the filters keep. With top-k or top-p, a sample of the row brackets the
//      threshold, the pass lists the tokens inside the bracket, and the block of the row that ends last finds the exact
//      threshold among them (threshold.h); where the sample misled, in the row itself.
//   3. residual_kernel: each block works out the chances of the chain, a few numbers, and sums the residual of its
//      piece: of one row token-wise, and of every row for block verification, whose coins need the sums. The block that
//      ends last tosses those coins and draws: from the pieces' sums it knows which piece to look at.
// At temperature 0 the largest logits decide and greedy_kernel replaces the last two.
//
// Floor: the logits' bytes once from memory and twice more from the L2 cache (token-wise the third pass reads two rows).
//
// A row with NaN, +inf, only -inf or an overflow cannot raise here: where the chain has one, next_token is -1, with nothing
// accepted.
#include "verify_rejection.h"

#include <climits>

#include "cuda/bracket.h"
#include "cuda/row_max.h"

namespace specbranch::cuda {
namespace {

using namespace rejection;

constexpr int64_t max_rows = 1024;  // of the target: what a block holds of every row stays below 48 KiB
constexpr int residual_threads = 256;
constexpr int residual_warps = residual_threads / warp_size;
constexpr int greedy_threads = 256;

// A row as the later launches see it. Cleared by the first.
struct RowInfo {
  Word64 sum;           // of the kept tokens' weights
  Word64 all, above;    // of all tokens' weights; of the tokens above the bracket (top-k: their number)
  unsigned listed, finished;
  float z_max, threshold;
  int32_t argmax;
  int32_t usable;
};

struct Arguments {
  const void *target, *draft;
  int64_t target_stride, draft_stride;
  const int64_t *tokens, *positions, *seed;
  int64_t *accepted, *next_token;
  int32_t n, vocabulary;
  float inverse_temperature, min_p;
  bool block, search_count, search_mass;
  double top_k, top_p;
  int32_t max_pieces, max_groups, weigh_pieces, weigh_groups, residual_pieces, residual_groups, list_capacity;
  // Workspace.
  Word64* maxima;      // [2n - 1, max_pieces]: keys of the largest logits
  RowInfo* info;       // [2n - 1]: the target's rows, then the draft's
  Word64* parts;       // [n, residual_pieces], or one row of them token-wise
  float* list;         // [2n - 1, list_capacity]: z of tokens inside the bracket
  unsigned* finished;  // blocks of the last launch

  template <typename T>
  __device__ LogitRow<T> row(int32_t i) const {
    return i < n ? LogitRow<T>(target, target_stride, i, vocabulary)
                 : LogitRow<T>(draft, draft_stride, i - n, vocabulary);
  }
  __device__ NoiseKey key(int32_t i) const {
    return {static_cast<uint64_t>(*seed), static_cast<uint64_t>(positions[i])};
  }
};

// By one warp: the key of a row's largest logit.
__device__ inline Word64 row_key(const Arguments& a, int32_t row_index) {
  const Word64* maxima = a.maxima + static_cast<int64_t>(row_index) * a.max_pieces;
  Word64 key = 0;
  for (int i = lane_index(); i < a.max_pieces; i += warp_size) key = larger(key, maxima[i]);
  return warp_max(key);
}

template <typename T>
__global__ void __launch_bounds__(row_max_threads) max_kernel(const __grid_constant__ Arguments a) {
  Word64* warp_best = shared_memory<Word64>();
  const int32_t row_index = static_cast<int32_t>(blockIdx.x) / a.max_pieces;
  const int32_t piece = static_cast<int32_t>(blockIdx.x) % a.max_pieces;
  if (piece == 0 && threadIdx.x == 0) {
    a.info[row_index] = RowInfo{};
    if (row_index == 0) *a.finished = 0;
  }
  const LogitRow<T> row = a.row<T>(row_index);
  const int32_t begin = piece * a.max_groups, end = min(begin + a.max_groups, row.groups());
  GroupReader<T, row_max_threads> reader(row, begin + static_cast<int32_t>(threadIdx.x), end);
  Word64 best = 0;
  int32_t token = group_tokens * (begin + static_cast<int32_t>(threadIdx.x));
  constexpr int unroll = 4;  // loads in flight
  for (int32_t base = begin; base < end; base += unroll * row_max_threads) {
    Group groups[unroll];
#pragma unroll
    for (Group& group : groups) group = reader.next();
#pragma unroll
    for (const Group& group : groups) {
#pragma unroll
      for (int j = 0; j < group_tokens; ++j) {
        const float x = group.x[j];
        best = larger(best, x != x ? nan_key : candidate_key(x, token + j));
      }
      token += group_tokens * row_max_threads;
    }
  }
  best = warp_max(best);
  if (lane_index() == 0) warp_best[warp_index()] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < row_max_threads / warp_size; ++w) best = larger(best, warp_best[w]);
  a.maxima[blockIdx.x] = best;
}

// ---- The second launch.

struct WeighShared {
  union {
    SelectShared select;
    BracketShared bracket;
  };
  Word64 warps[4][sampler_warps];
  Word64 key;
  bool is_last;
};

// What the threshold is searched in: the row's list, or all of it.
template <typename T>
struct Entries {
  const LogitRow<T>& row;
  const float* list;
  uint32_t listed;
  bool of_list, by_mass;
  float inverse_temperature, z_max;

  __device__ uint32_t count() const { return of_list ? listed : static_cast<uint32_t>(row.vocabulary); }
  __device__ float z(uint32_t i) const {
    return of_list ? __ldcg(list + i) : row[static_cast<int32_t>(i)] * inverse_temperature;
  }
  __device__ Word64 key(uint32_t i) const { return ordered(z(i)); }
  __device__ Word64 mass(uint32_t i) const { return FixedPoint(exp_nonpositive(z(i) - z_max)).value(); }
  __device__ Word64 weight(uint32_t i) const { return by_mass ? mass(i) : 1; }
  // By all threads: the weights of what a threshold and min-p keep.
  __device__ Word64 sum(Word64 cut, float min_p, Word64 (&warps)[sampler_warps]) const {
    Word64 mine = 0;
    for (uint32_t i = threadIdx.x; i < count(); i += sampler_threads) {
      const float w = exp_nonpositive(z(i) - z_max);
      if (key(i) >= cut && w >= min_p) mine += FixedPoint(w).value();
    }
    return block_sum(mine, warps);
  }
};

// By all threads of the row's last block: sets the row's threshold and sum. False when the bracket misled.
template <typename T>
__device__ bool find_threshold(const Arguments& a, WeighShared& s, Entries<T> entries, const Bracket& bracket,
                               Word64 above, Word64 all, Word64 kept_above, RowInfo& info) {
  const Word64 largest = ordered(entries.z_max), lowest = ordered(lowest_finite);
  Word64 low = larger(ordered(bracket.low), lowest), high = ordered(bracket.top), cut = lowest;
  if (high > largest) high = largest;
  const bool has_all_above = bracket.top == infinity, has_all_below = low == lowest;
  const auto search = [&](double target) {
    if (!has_all_above && !(static_cast<double>(above) < target)) return false;
    return (low <= high && radix_select(s.select, entries, low, high, above, target, true, cut)) || has_all_below;
  };
  if (a.search_count) {
    entries.by_mass = false;
    if (!search(a.top_k)) return false;
  }
  if (a.search_mass) {
    entries.by_mass = true;
    if (a.search_count) {  // the list reaches up to the largest token, and goes down to the cut at least
      all = entries.sum(cut, 0.0f, s.warps[0]);
      above = 0;
      low = cut;
    }
    if (!search(a.top_p * static_cast<double>(all)) && !a.search_count) return false;
  }
  const Word64 sum = kept_above + entries.sum(cut, a.min_p, s.warps[1]);
  if (threadIdx.x == 0) {
    info.threshold = from_ordered(static_cast<uint32_t>(cut));
    info.sum = sum;
  }
  return true;
}

template <typename T, bool search>
__global__ void __launch_bounds__(sampler_threads) weigh_kernel(const __grid_constant__ Arguments a) {
  WeighShared& s = *shared_memory<WeighShared>();
  const int32_t row_index = static_cast<int32_t>(blockIdx.x) / a.weigh_pieces;
  const int32_t piece = static_cast<int32_t>(blockIdx.x) % a.weigh_pieces;
  const LogitRow<T> row = a.row<T>(row_index);
  RowInfo& info = a.info[row_index];

  if (warp_index() == 0) {
    const Word64 key = row_key(a, row_index);
    if (lane_index() == 0) s.key = key;
  }
  __syncthreads();
  const Word64 max_key = s.key;
  if (!usable(max_key, a.inverse_temperature)) return;  // info says so already
  const float z_max = key_score(max_key) * a.inverse_temperature;
  if (piece == 0 && threadIdx.x == 0) {
    info.z_max = z_max;
    info.argmax = key_token(max_key);
    info.usable = 1;
    if (!search) info.threshold = lowest_finite;
  }

  Bracket bracket{lowest_finite, infinity};
  // The pass. Without a search every token lies above the bracket, and nothing is listed.
  MassSum kept, all, above;
  unsigned number_above = 0;
  float* list = a.list + static_cast<int64_t>(row_index) * a.list_capacity;
  const int32_t begin = piece * a.weigh_groups, end = min(begin + a.weigh_groups, row.groups());
  GroupReader<T, sampler_threads> reader(row, begin + static_cast<int32_t>(threadIdx.x), end);
  Group next = reader.next();
  for (int32_t base = begin; base < end; base += sampler_threads) {
    const Group group = next;
    next = reader.next();
#pragma unroll
    for (int j = 0; j < group_tokens; ++j) {
      const float z = group.x[j] * a.inverse_temperature;
      const float w = exp_nonpositive(z - z_max);
      const FixedPoint q(w);
      const bool over = !search || z > bracket.top;
      if (over && w >= a.min_p) kept.add(q);
      if (!search) continue;
      all.add(q);
      if (over) {
        above.add(q);
        ++number_above;
      }
      const bool inside = z >= bracket.low && !over;
      const unsigned lanes = __ballot_sync(all_lanes, inside);
      if (lanes == 0) continue;
      unsigned first = 0;
      if (lane_index() == 0) first = atomicAdd(&info.listed, static_cast<unsigned>(__popc(lanes)));
      const unsigned at = __shfl_sync(all_lanes, first, 0) + static_cast<unsigned>(rank_in(lanes));
      if (inside && at < static_cast<unsigned>(a.list_capacity)) list[at] = z;
    }
  }
  const Word64 kept_sum = block_sum(kept.value(), s.warps[0]);
  if (!search) {
    if (threadIdx.x == 0) atomicAdd(&info.sum, kept_sum);
    return;
  }
  const Word64 all_sum = block_sum(all.value(), s.warps[1]);
  const Word64 above_sum = block_sum(a.search_count ? number_above : above.value(), s.warps[2]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(&info.sum, kept_sum);
    atomicAdd(&info.all, all_sum);
    atomicAdd(&info.above, above_sum);
    __threadfence();
    s.is_last = atomicAdd(&info.finished, 1u) == static_cast<unsigned>(a.weigh_pieces) - 1;
  }
  __syncthreads();
  if (!s.is_last) return;
  __threadfence();

  const unsigned listed = __ldcg(&info.listed);
  const Word64 row_kept = __ldcg(&info.sum), row_all = __ldcg(&info.all), row_above = __ldcg(&info.above);
  __syncthreads();  // before thread 0 writes the sum
  // First in the list and, where the bracket misled, in the row.
  bool of_list = listed <= static_cast<unsigned>(a.list_capacity);
#pragma unroll 1
  for (;; of_list = false) {
    const Entries<T> entries{row, list, listed, of_list, false, a.inverse_temperature, z_max};
    const Bracket searched = of_list ? bracket : Bracket{lowest_finite, infinity};
    if (find_threshold(a, s, entries, searched, of_list ? row_above : 0, row_all, of_list ? row_kept : 0, info)) return;
  }
}

// ---- The last launch.

struct WalkShared {
  Word64 warps[residual_warps];
  Word64 left;  // of the uniform integer, in the piece
  int drafted, drawn, accepted, piece;
  bool unusable, is_last;
  // Then of every row of the target: one over the sum of its weights; of its drafted token q of the target, and D; and
  // the chance of the path with that token.
};
__host__ __device__ inline size_t walk_shared_bytes(int64_t n) {
  return sizeof(WalkShared) + 4 * sizeof(double) * static_cast<size_t>(n);
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
template <typename T>
struct Residual {
  LogitRow<T> target, draft;
  RowInfo target_info, draft_info;
  double target_scale, draft_scale;
};

// The residual's weights, four tokens for each call of next(): the groups of a GroupReader.
template <typename T>
class ResidualReader {
 public:
  __device__ ResidualReader(const Arguments& a, const Residual<T>& residual, int32_t first, int32_t end)
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
  const Residual<T>& r_;
  GroupReader<T, residual_threads> target_, draft_;
};

template <typename T>
__global__ void __launch_bounds__(residual_threads) residual_kernel(const __grid_constant__ Arguments a) {
  WalkShared& s = *shared_memory<WalkShared>();
  double* share = reinterpret_cast<double*>(&s + 1);
  double *target_weight = share + a.n, *draft_chance = target_weight + a.n, *path = draft_chance + a.n;
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t block_row = static_cast<int32_t>(blockIdx.x) / a.residual_pieces;
  const int32_t piece = static_cast<int32_t>(blockIdx.x) % a.residual_pieces;

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
    target_weight[i] = weight_of(a.row<T>(i)[token], info, a);
    draft_chance[i] = 1.0 / static_cast<double>(draft_info.sum) * weight_of(a.row<T>(a.n + i)[token], draft_info, a);
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
    return Residual<T>{a.row<T>(i), a.row<T>(other), a.info[i], a.info[other], scale,
                       against ? 1.0 / static_cast<double>(a.info[other].sum) : 0.0};
  };
  const int32_t row_index = a.block ? block_row : min(s.accepted, drawn);
  const int32_t groups = (a.vocabulary - 1) / group_tokens + 1;
  Word64 sum = 0;
  if (row_index <= drawn) {
    const Residual<T> residual = residual_of(row_index);
    const int32_t begin = piece * a.residual_groups, end = min(begin + a.residual_groups, groups);
    ResidualReader<T> reader(a, residual, begin + thread, end);
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
    __threadfence();
    s.is_last = atomicAdd(a.finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!s.is_last) return;
  __threadfence();

  // How many tokens are accepted, by block verification.
  if (a.block) {
    for (int i = 1 + warp_index(); i <= drawn; i += residual_warps) {
      Word64 row_sum = 0;
      for (int p = lane_index(); p < a.residual_pieces; p += warp_size) {
        row_sum += __ldcg(a.parts + static_cast<int64_t>(i) * a.residual_pieces + p);
      }
      row_sum = warp_sum(row_sum);
      if (lane_index() != 0) continue;
      const double chance = i == drawn ? path[i - 1] : block_chance(row_sum, path[i - 1]);
      if (says_yes(random_integer(a.key(0), i - 1, Purpose::accept), chance)) atomicMax(&s.accepted, i);
    }
    __syncthreads();
  }
  const int accepted = a.block ? s.accepted : row_index;

  // Which piece the uniform integer falls into. There are no more pieces than threads.
  const Word64* parts = a.parts + (a.block ? static_cast<int64_t>(accepted) * a.residual_pieces : 0);
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
  const Word64 part = thread < a.residual_pieces ? __ldcg(parts + thread) : 0;
  Word64 all = 0;
  const Word64 through = sum_through(part, all);
  if (thread == 0) *a.accepted = accepted;
  if (all == 0) {  // draft and target are equal, so the rejection was rounding
    if (thread == 0) *a.next_token = a.info[accepted].argmax;
    return;
  }
  const Word64 uniform = below(all, random_integer(a.key(accepted), 0, Purpose::residual));
  if (uniform < through && uniform >= through - part) {
    s.piece = thread;
    s.left = uniform - (through - part);
  }
  __syncthreads();

  const Residual<T> residual = residual_of(accepted);
  Word64 left = s.left;
  const int32_t begin = s.piece * a.residual_groups, end = min(begin + a.residual_groups, groups);
  ResidualReader<T> reader(a, residual, begin + thread, end);
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

// ---- The workspace, and how rows are cut: from shapes alone, so that a captured graph stays valid.

bool searches_count(const Filters& f, int64_t vocabulary) { return f.top_k > 0 && f.top_k < vocabulary; }
bool searches_mass(const Filters& f) { return f.top_p < 1.0; }

struct Layout {
  Pieces max, weigh, residual;
  int32_t list_capacity;
  int64_t maxima, info, parts, list, finished, bytes;

  Layout(int64_t n, int64_t vocabulary, const Filters& f, bool block)
      : Layout(n, vocabulary, !f.greedy() && (searches_count(f, vocabulary) || searches_mass(f)), block) {}
  Layout(int64_t n, int64_t vocabulary, bool search, bool block)
      : max(Pieces::for_max(2 * n - 1, vocabulary)),
        // With a search, a block for each multiprocessor of an H100: each has a sample to draw first.
        weigh(2 * n - 1, vocabulary, /*wanted_blocks=*/(search ? 1 : 3) * 132,
              /*min_tokens=*/sampler_threads * group_tokens, /*max_count=*/1024),
        residual(block ? n : 1, vocabulary, /*wanted_blocks=*/(block ? 4 : 1) * 132, /*min_tokens=*/1024,
                 /*max_count=*/residual_threads),
        list_capacity(search ? static_cast<int32_t>(std::min<int64_t>(vocabulary, 16384)) : 0) {
    const auto place = [this](int64_t size) {
      const int64_t at = bytes;
      bytes += divide_up(size, 256) * 256;
      return at;
    };
    bytes = 0;
    maxima = place((2 * n - 1) * max.count * static_cast<int64_t>(sizeof(Word64)));
    info = place((2 * n - 1) * static_cast<int64_t>(sizeof(RowInfo)));
    parts = place(n * residual_threads * static_cast<int64_t>(sizeof(Word64)));
    list = place((2 * n - 1) * list_capacity * static_cast<int64_t>(sizeof(float)));
    finished = place(sizeof(unsigned));
  }
};

template <typename T>
void run(const VerifyRejectionParams& p, const Arguments& a) {
  const auto blocks = [](int64_t count) { return dim3(static_cast<unsigned>(count)); };
  const int64_t rows = 2 * p.target_logits.shape[0] - 1;
  launch("verify_rejection (max)", max_kernel<T>, p.launch, blocks(rows * a.max_pieces), dim3(row_max_threads),
         row_max_threads / warp_size * sizeof(Word64), a);
  if (p.filters.greedy()) {
    launch("verify_rejection (greedy)", greedy_kernel, p.launch, dim3(1), dim3(greedy_threads), 3 * sizeof(int), a);
    return;
  }
  launch("verify_rejection (weigh)", a.search_count || a.search_mass ? weigh_kernel<T, true> : weigh_kernel<T, false>,
         p.launch, blocks(rows * a.weigh_pieces), dim3(sampler_threads), sizeof(WeighShared), a);
  launch("verify_rejection (residual)", residual_kernel<T>, p.launch, blocks((p.block ? a.n : 1) * a.residual_pieces),
         dim3(residual_threads), walk_shared_bytes(a.n), a);
}

}  // namespace

int64_t verify_rejection_workspace(int64_t n, int64_t vocabulary, const Filters& filters) {
  if (n < 1 || vocabulary < 1) return 0;  // refused later
  return Layout(n, vocabulary, filters, /*block=*/true).bytes;  // parts has room for all rows
}

void verify_rejection(const VerifyRejectionParams& p) {
  const int64_t n = p.target_logits.shape[0], vocabulary = p.target_logits.shape[1];
  if (n > max_rows) {
    fail("target_logits: expected at most 1024 rows on a CUDA device, got " + shape_text(p.target_logits));
  }
  const Layout layout(n, vocabulary, p.filters, p.block);
  char* memory = static_cast<char*>(p.launch.workspace);
  Arguments a{};
  a.target = p.target_logits.data;
  a.draft = p.draft_logits.data;
  a.target_stride = p.target_logits.stride[0];
  a.draft_stride = p.draft_logits.stride[0];
  a.tokens = p.tokens.as<const int64_t>();
  a.positions = p.positions.as<const int64_t>();
  a.seed = p.seed.as<const int64_t>();
  a.accepted = p.accepted.as<int64_t>();
  a.next_token = p.next_token.as<int64_t>();
  a.n = static_cast<int32_t>(n);
  a.vocabulary = static_cast<int32_t>(vocabulary);
  a.inverse_temperature = p.filters.inverse_temperature();
  a.min_p = static_cast<float>(p.filters.min_p);
  a.block = p.block;
  a.search_count = searches_count(p.filters, vocabulary);
  a.search_mass = searches_mass(p.filters);
  a.top_k = static_cast<double>(p.filters.top_k);
  a.top_p = p.filters.top_p;
  a.max_pieces = layout.max.count;
  a.max_groups = layout.max.groups;
  a.weigh_pieces = layout.weigh.count;
  a.weigh_groups = layout.weigh.groups;
  a.residual_pieces = layout.residual.count;
  a.residual_groups = layout.residual.groups;
  a.list_capacity = layout.list_capacity;
  a.maxima = reinterpret_cast<Word64*>(memory + layout.maxima);
  a.info = reinterpret_cast<RowInfo*>(memory + layout.info);
  a.parts = reinterpret_cast<Word64*>(memory + layout.parts);
  a.list = reinterpret_cast<float*>(memory + layout.list);
  a.finished = reinterpret_cast<unsigned*>(memory + layout.finished);
  switch (p.target_logits.dtype) {
    case Dtype::bfloat16: return run<Bfloat16>(p, a);
    case Dtype::float16: return run<Float16>(p, a);
    default: return run<float>(p, a);
  }
}

}  // namespace specbranch::cuda

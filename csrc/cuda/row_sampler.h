// The second launch of verify and draft_sample: the kept tokens with the largest scaled logit + noise.
//
// A row is cut into pieces, one block each. A block
//   1. merges what the first launch found: the row's largest logit, and scores of a few tokens as the first floor that
//      a candidate must beat;
//   2. with top-k or top-p on, guesses a bracket around their threshold from a sample of the row;
//   3. goes over its piece once. It sums the weights of the row and of the tokens above the bracket, lists the tokens
//      inside it with their scores in the workspace, and keeps the best of those above it, which are surely kept.
// The block of a row that ends last finds the exact threshold among the listed tokens and merges the candidates. Where
// the bracket misled, it searches the row itself and then goes over all of it as in step 3.
//
// Why so: a sort or a radix select over the row would go over it four times, and the blocks of a row would have to wait
// for each other in between. Here a token costs one exponential (with top-p or statistics) and, if it may win, noise.
// Noise is dense where most tokens may win (one Philox block for the four tokens of a thread), and sparse where the
// filters leave few: these are collected until there is one for every lane of a warp. Two logarithms are spent only on
// tokens whose random word allows a score above the floor (the test of csrc/cpu/noise_scan.h).
//
// Floor: the logits' bytes twice, the second time from the L2 cache. Instructions a token (sm_90): 45 with top-p, 33 of
// them for the weight; 40 without filters, 23 of them for Philox and the test.
#pragma once

#include "cuda/bracket.h"
#include "cuda/candidates.h"
#include "cuda/row_max.h"
#include "sampling.h"

namespace specbranch::cuda {

struct SampleArguments {
  const void* logits;
  int64_t stride;
  const int64_t* positions;
  const int64_t* seed;
  int32_t vocabulary;
  int32_t max_pieces;            // of the first launch
  int32_t pieces, piece_groups;  // of this one
  float inverse_temperature, min_p;
  float min_p_distance;  // no token further below the largest is kept by min_p
  bool greedy, search_count, search_mass;
  double top_k, top_p;
  float mass_scale;
  BracketPlan bracket_plan;
  int32_t list_capacity;
  // Workspace.
  const Word64* maxima;  // [rows, max_pieces]
  const float* masses;   // [rows, max_pieces], see row_max.h
  RowState* state;       // [rows]
  float* list_z;         // [rows, list_capacity]
  Word64* list_key;      // [rows, list_capacity]; 0: not a candidate
};

// RowState::sums.
enum Sum {
  sum_all,    // weights of the row
  sum_above,  // weights (top-k: numbers) of tokens above the bracket
  // With statistics, over kept tokens above the bracket:
  sum_kept,     // weights
  sum_distance  // weights times z_max - z
};
constexpr int sum_count = 4;

template <typename Best>
struct SamplerShared {
  union {
    SelectShared select;
    BracketShared bracket;
  };
  int32_t pending_token[sampler_warps][2 * warp_size];
  float pending_z[sampler_warps][2 * warp_size];
  Word64 sums[sum_count][sampler_warps];
  Word64 max_key, floor;
  float mass, bins_per_unit;  // of bracket.h
  bool is_last;
  typename Best::Shared best;
};

template <typename T, typename Best, bool statistics>
class RowSampler {
 public:
  using Shared = SamplerShared<Best>;

  __device__ RowSampler(const SampleArguments& arguments, Shared& shared, const Best& best, int k)
      : a_(arguments),
        s_(shared),
        best_(best),
        k_(k),
        row_index_(blockIdx.x / static_cast<unsigned>(arguments.pieces)),
        piece_(static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(arguments.pieces))),
        row_(arguments.logits, arguments.stride, row_index_, arguments.vocabulary),
        state_(arguments.state[row_index_]),
        list_z_(arguments.list_z + row_index_ * arguments.list_capacity),
        list_key_(arguments.list_key + row_index_ * arguments.list_capacity),
        noise_key_{static_cast<uint64_t>(*arguments.seed), static_cast<uint64_t>(arguments.positions[row_index_])} {}

  // True in the one block that is to write the row's result; all its candidates are then in best(), after a barrier.
  __device__ bool run();

  __device__ int64_t row_index() const { return row_index_; }
  __device__ bool is_usable() const { return usable_; }
  __device__ Best& best() { return best_; }
  __device__ float z(int32_t token) const { return row_[token] * a_.inverse_temperature; }
  __device__ float z_max() const { return z_max_; }
  // What top-k and top-p keep has this z or more.
  __device__ float threshold() const { return threshold_; }
  // Sums over all kept tokens, in units of 2^-40: of weights, and of weights times z_max - z.
  __device__ Word64 kept() const { return kept_; }
  __device__ Word64 kept_distance() const { return kept_distance_; }

 private:
  using Reader = GroupReader<T, sampler_threads>;

  // The entries of the row's list, or of the row.
  struct Entries {
    const RowSampler& sampler;
    bool from_row, mass;
    uint32_t listed;

    __device__ uint32_t count() const { return from_row ? static_cast<uint32_t>(sampler.a_.vocabulary) : listed; }
    __device__ float z(uint32_t i) const {
      return from_row ? sampler.z(static_cast<int32_t>(i)) : sampler.list_z_[i];
    }
    __device__ Word64 key(uint32_t i) const { return ordered(z(i)); }
    __device__ Word64 weight(uint32_t i) const { return mass ? sampler.weight(z(i)) : 1; }
  };

  __device__ bool searches() const { return a_.search_count || a_.search_mass; }
  __device__ bool min_p_keeps(float weight) const { return a_.min_p == 0.0f || weight >= a_.min_p; }
  __device__ Word64 weight(float z) const { return FixedPoint(exp_nonpositive(z - z_max_)).value(); }
  // Less than 1.
  __device__ float times_distance(float weight, float z) const { return weight * fminf(z_max_ - z, 88.0f); }

  __device__ Word64 candidate(int32_t token, float z) const {
    if (!(z >= lowest_finite)) return 0;
    if (a_.min_p > 0.0f && !(exp_nonpositive(z - z_max_) >= a_.min_p)) return 0;
    return candidate_key(a_.greedy ? z : z + noise_of(noise_key_, token), token);
  }

  __device__ void find_start();
  __device__ Bracket guess_bracket(const ThreadSample& sample);
  __device__ void scan(Reader reader, Group next, uint32_t first_token, int32_t steps, const Bracket& bracket);
  __device__ void evaluate(bool active, int32_t token, float z, const Bracket& bracket);
  __device__ void flush(const MassSum (&masses)[3], float distance, uint32_t above);
  __device__ bool publish();
  __device__ bool find_threshold(const Bracket& bracket, float& threshold);
  __device__ void merge_list(float threshold);

  const SampleArguments& a_;
  Shared& s_;
  Best best_;
  const int k_;
  const int64_t row_index_;
  const int32_t piece_;
  const LogitRow<T> row_;
  RowState& state_;
  float* const list_z_;
  Word64* const list_key_;
  const NoiseKey noise_key_;
  bool usable_ = false;
  float z_max_ = 0.0f, threshold_ = lowest_finite;
  Word64 kept_ = 0, kept_distance_ = 0;
};

template <typename T, typename Best, bool statistics>
__device__ bool RowSampler<T, Best, statistics>::run() {
  const int thread = static_cast<int>(threadIdx.x);
  int32_t begin = piece_ * a_.piece_groups, groups = min(row_.groups() - begin, a_.piece_groups);
  // Loads first: nothing here waits for them yet.
  Reader reader(row_, begin + thread, begin + groups);
  Group next = reader.next();
  ThreadSample sample;
  const bool sampled = searches() && a_.vocabulary > min_sampled_vocabulary;
  if (sampled) {
    sample.load(row_);
    clear(s_.bracket);
  }
  for (int i = thread; i < sum_count * sampler_warps; i += sampler_threads) (&s_.sums[0][0])[i] = 0;
  if (warp_index() == 0) find_start();
  __syncthreads();
  usable_ = usable(s_.max_key, a_.inverse_temperature);
  if (!usable_) return piece_ == 0;
  z_max_ = key_score(s_.max_key) * a_.inverse_temperature;

  Bracket bracket{lowest_finite, infinity};
  if (sampled) {
    bracket = guess_bracket(sample);
  } else if (!searches()) {  // all that is not masked, or hopeless for min-p
    bracket.low = bracket.top = a_.min_p > 0.0f ? fmaxf(z_max_ + a_.min_p_distance, lowest_finite) : lowest_finite;
  }

  for (bool whole_row = false;; whole_row = true) {
    scan(reader, next, group_tokens * static_cast<uint32_t>(begin + thread),
         static_cast<int32_t>(divide_up(groups, sampler_threads)), bracket);
    __syncthreads();
    if (whole_row) {
      for (int w = 0; w < sampler_warps; ++w) {
        kept_ += s_.sums[sum_kept][w];
        kept_distance_ += s_.sums[sum_distance][w];
      }
      return true;
    }
    if (!publish()) return false;
    if (!searches() || find_threshold(bracket, threshold_)) {
      merge_list(threshold_);
      return true;
    }
    // The bracket misled: the same once more, with the threshold, for the whole row.
    bracket.low = bracket.top = threshold_;
    begin = 0;
    groups = row_.groups();
    reader = Reader(row_, thread, groups);
    next = reader.next();
    for (int i = thread; i < sum_count * sampler_warps; i += sampler_threads) (&s_.sums[0][0])[i] = 0;
    if (thread == 0) best_.start(s_.floor);
    __syncthreads();
  }
}

// By the first warp: the row's largest logit, and a floor that some k kept tokens reach.
template <typename T, typename Best, bool statistics>
__device__ void RowSampler<T, Best, statistics>::find_start() {
  const Word64* maxima = a_.maxima + row_index_ * a_.max_pieces;
  const int lane = lane_index();
  const Word64 first = lane < a_.max_pieces ? maxima[lane] : 0;
  const Word64 second = lane + warp_size < a_.max_pieces ? maxima[lane + warp_size] : 0;
  Word64 mine = larger(first, second);
  const Word64 max_key = warp_max(mine);
  z_max_ = key_score(max_key) * a_.inverse_temperature;
  // With a threshold still to be found, only the largest token is known to be kept.
  if (searches()) mine = lane == 0 ? max_key : 0;
  Word64 floor = 0;
  if (mine != 0 && usable(max_key, a_.inverse_temperature)) {
    floor = candidate(key_token(mine), key_score(mine) * a_.inverse_temperature);
  }
  if (k_ == 1) {
    floor = warp_max(floor);
  } else {
    // Bitonic sort, largest first.
#pragma unroll
    for (int size = 2; size <= warp_size; size *= 2) {
#pragma unroll
      for (int stride = size / 2; stride > 0; stride /= 2) {
        const Word64 other = __shfl_xor_sync(all_lanes, floor, stride);
        const bool takes_larger = ((lane & stride) == 0) == ((lane & size) == 0);
        floor = (other > floor) == takes_larger ? other : floor;
      }
    }
    floor = k_ <= warp_size ? __shfl_sync(all_lanes, floor, (k_ - 1) % warp_size) : 0;
  }
  float mass = 0.0f, bins_per_unit = 0.0f;
  if (a_.search_count) {
    const auto finite = [](Word64 key) { return key != 0 && key_score(key) >= lowest_finite ? key : ~Word64{0}; };
    const Word64 min_key = ~warp_max(larger(~finite(first), ~finite(second)));
    bins_per_unit = a_.bracket_plan.count_bins(z_max_ - key_score(min_key) * a_.inverse_temperature);
  } else if (a_.search_mass) {
    const float* masses = a_.masses + row_index_ * a_.max_pieces;
    const auto part = [&](int i, Word64 key) {
      return key == 0 ? 0.0f : masses[i] * exp2_approximate((key_score(key) - key_score(max_key)) * a_.mass_scale);
    };
    mass = warp_sum(part(lane, first) + part(lane + warp_size, second));
    bins_per_unit = a_.bracket_plan.mass_bins(mass);
  }
  if (lane == 0) {
    s_.mass = mass;
    s_.bins_per_unit = bins_per_unit;
    s_.max_key = max_key;
    s_.floor = floor;
    best_.start(floor);
  }
}

template <typename T, typename Best, bool statistics>
__device__ Bracket RowSampler<T, Best, statistics>::guess_bracket(const ThreadSample& sample) {
  const float bins_per_unit = s_.bins_per_unit;
  count_sample(s_.bracket, sample, a_.inverse_temperature, z_max_, bins_per_unit);
  __syncthreads();
  // With both filters on the list has to hold all that top-k keeps.
  Bracket bracket =
      a_.search_count
          ? bracket_count(s_.bracket, z_max_, a_.bracket_plan, bins_per_unit, /*open=*/a_.search_mass)
          : bracket_mass(s_.bracket, z_max_, a_.bracket_plan, s_.mass, bins_per_unit);
  bracket.low = fminf(fmaxf(bracket.low, lowest_finite), bracket.top);
  return bracket;
}

// Goes over the groups of a reader, `next` before them. first_token: of the thread's first group.
template <typename T, typename Best, bool statistics>
__device__ void RowSampler<T, Best, statistics>::scan(Reader reader, Group next, uint32_t first_token, int32_t steps,
                                                      const Bracket& bracket) {
  constexpr int dense_lanes = 4;                  // from more on, noise is drawn for all lanes at once
  constexpr int max_steps = 4095 / group_tokens;  // of a MassSum
  const int lane = lane_index(), warp = warp_index();
  const bool weighs = statistics || a_.search_mass;
  const bool counts = a_.search_count && bracket.top < infinity;
  // The upper 23 bits of a random word over 2^32, plus 1.
  const auto unit = [](uint32_t word) { return __uint_as_float(word >> 9 | 0x3F800000u); };
  // What a token must reach to be among the best; with noise less, for every rounding (see csrc/cpu/noise_scan.h).
  const auto current_reach = [&] {
    const float floor = best_.floor_score();
    return a_.greedy ? floor : floor - (2e-3f + 1e-6f * fabsf(floor));
  };

  MassSum masses[3];  // all, above, kept
  float distance = 0.0f;
  uint32_t above = 0, token = first_token;
  int pending = 0, until_flush = max_steps;
  for (;;) {
    const bool last = --steps == 0;
    float z[group_tokens];
#pragma unroll
    for (int j = 0; j < group_tokens; ++j) z[j] = next.x[j] * a_.inverse_temperature;
    next = reader.next();

    if (weighs) {
#pragma unroll
      for (int j = 0; j < group_tokens; ++j) {
        const float weight = exp_nonpositive(z[j] - z_max_);
        const FixedPoint q(weight);
        if (!statistics || a_.search_mass) {
          masses[sum_all].add(q);
          if (z[j] >= bracket.top) masses[sum_above].add(q);
        }
        if (statistics && z[j] >= bracket.top && min_p_keeps(weight)) {
          masses[sum_kept].add(q);
          distance += times_distance(weight, z[j]);
        }
      }
    }
    if (counts) {
#pragma unroll
      for (int j = 0; j < group_tokens; ++j) above += z[j] >= bracket.top ? 1u : 0u;
    }
    if (--until_flush == 0 || last) {
      flush(masses, distance, above);
      masses[0] = masses[1] = masses[2] = MassSum{};
      distance = 0.0f;
      above = 0;
      until_flush = max_steps;
    }

    // Who may win, or is inside the bracket?
    float least = bracket.low, reach = -infinity;
    if (!searches()) {
      reach = current_reach();
      least = fmaxf(least, a_.greedy ? reach : reach - max_noise);
    }
    const float most = fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3]));
    bool near = most >= least;
    const unsigned nears = __ballot_sync(all_lanes, near);
    if (nears != 0 || last) {
      const bool dense = !a_.greedy && __popc(nears) > dense_lanes;
      float limit = infinity;
      PhiloxWords words{};
      if (dense) {
        words = noise_key_.block(token / group_tokens, Purpose::gumbel);
        const uint32_t(&w)[4] = words.word;
        if (searches()) reach = current_reach();
        limit = 1.0f + exp2f((most - reach) * 1.44269504f);
        near = near && unit(min(min(w[0], w[1]), min(w[2], w[3]))) <= limit;
      }
      if (!dense || searches() || last || __any_sync(all_lanes, near)) {
        const int rounds = last ? group_tokens + 1 : group_tokens;  // the last one empties the list
#pragma unroll 1
        for (int j = 0; j < rounds; ++j) {
          const float z_j = pick(z, j);
          const bool inside = z_j >= bracket.low && !(z_j >= bracket.top);
          const bool may_win = near && z_j >= least && unit(pick(words.word, j)) <= limit;
          const bool wanted = (inside || may_win) && j < group_tokens;
          const unsigned lanes = __ballot_sync(all_lanes, wanted);
          if (wanted) {
            const int at = pending + rank_in(lanes);
            s_.pending_token[warp][at] = static_cast<int32_t>(token) + j;
            s_.pending_z[warp][at] = z_j;
          }
          pending += __popc(lanes);
          if (pending >= warp_size || (j == group_tokens && pending > 0)) {
            __syncwarp();
            const int taken = min(pending, warp_size);
            pending -= taken;
            const bool active = lane < taken;
            evaluate(active, active ? s_.pending_token[warp][pending + lane] : 0,
                     active ? s_.pending_z[warp][pending + lane] : -infinity, bracket);
            __syncwarp();
          }
        }
      }
    }
    best_.end_step(s_.select);
    if (last) return;
    token += group_tokens * sampler_threads;
  }
}

// Scores one token for each lane.
template <typename T, typename Best, bool statistics>
__device__ void RowSampler<T, Best, statistics>::evaluate(bool active, int32_t token, float z, const Bracket& bracket) {
  const Word64 key = active ? candidate(token, z) : 0;
  if (z >= bracket.top) best_.offer(key);
  if (!searches()) return;
  const bool inside = active && !(z >= bracket.top);
  const unsigned lanes = __ballot_sync(all_lanes, inside);
  if (lanes == 0) return;
  unsigned at = 0;
  if (lane_index() == 0) at = atomicAdd(&state_.listed, static_cast<unsigned>(__popc(lanes)));
  at = __shfl_sync(all_lanes, at, 0) + rank_in(lanes);
  if (inside && at < static_cast<unsigned>(a_.list_capacity)) {
    list_z_[at] = z;
    list_key_[at] = key;
  }
}

template <typename T, typename Best, bool statistics>
__device__ void RowSampler<T, Best, statistics>::flush(const MassSum (&masses)[3], float distance, uint32_t above) {
  Word64 sums[sum_count] = {masses[sum_all].value(), masses[sum_above].value() + above, masses[sum_kept].value(),
                            static_cast<Word64>(static_cast<double>(distance) * two_to_40)};
#pragma unroll
  for (int i = 0; i < sum_count; ++i) {
    if (i >= sum_kept && !statistics) continue;
    sums[i] = warp_sum(sums[i]);
    if (lane_index() == 0) s_.sums[i][warp_index()] += sums[i];
  }
}

// Adds what this block found to the row's state; true in the block of the row that does so last.
template <typename T, typename Best, bool statistics>
__device__ bool RowSampler<T, Best, statistics>::publish() {
  best_.publish(s_.select, piece_, state_);
  __syncthreads();
  if (warp_index() == 0) {
    if (lane_index() < sum_count) {
      Word64 sum = 0;
      for (int w = 0; w < sampler_warps; ++w) sum += s_.sums[lane_index()][w];
      if (sum != 0) atomicAdd(&state_.sums[lane_index()], sum);
    }
    __syncwarp();
    if (lane_index() == 0) {
      __threadfence();
      s_.is_last = atomicAdd(&state_.finished, 1u) == static_cast<unsigned>(a_.pieces) - 1u;
      __threadfence();
    }
  }
  __syncthreads();
  return s_.is_last;
}

// The exact threshold of top-k and top-p; false when it had to be searched in the row, because the list lacks tokens.
template <typename T, typename Best, bool statistics>
__device__ bool RowSampler<T, Best, statistics>::find_threshold(const Bracket& bracket, float& threshold) {
  const uint32_t listed = state_.listed;
  bool from_row = listed > static_cast<uint32_t>(a_.list_capacity);
#pragma unroll 1
  for (int mass = a_.search_count ? 0 : 1; mass <= (a_.search_mass ? 1 : 0); ++mass) {
    const Word64 lowest = ordered(threshold), highest = ordered(z_max_);
    Word64 lo = ordered(bracket.low), hi = bracket.top < infinity ? ordered(bracket.top) - 1 : highest;
    Word64 above = state_.sums[sum_above];
    double target = a_.top_k;
    if (mass != 0) {
      Word64 all = state_.sums[sum_all];
      if (a_.search_count) {  // top-p of what top-k kept
        lo = lowest;
        all = 0;
        const Entries entries{*this, from_row, true, listed};
        for (uint32_t i = threadIdx.x; i < entries.count(); i += sampler_threads) {
          if (entries.z(i) >= threshold) all += entries.weight(i);
        }
        all = block_sum(all, s_.select.warp_sums);
        __syncthreads();
      }
      target = a_.top_p * static_cast<double>(all);
    }
    Word64 cut = 0;
    for (;;) {
      if (static_cast<double>(above) >= target) {  // the bracket lies too low
        from_row = true;
        lo = hi + 1;
        hi = highest;
        above = 0;
      }
      const Entries entries{*this, from_row, mass != 0, listed};
      if (lo <= hi && radix_select(s_.select, entries, lo, hi, above, target, /*stop_when_exact=*/mass == 0, cut)) {
        threshold = from_ordered(static_cast<uint32_t>(cut));
        break;
      }
      if (lo <= lowest) break;  // all are kept
      from_row = true;          // the bracket lies too high
      hi = lo - 1;
      lo = lowest;
    }
  }
  return !from_row;
}

// Merges the candidates of all blocks with the listed ones that the threshold keeps, and adds the latter to the sums.
template <typename T, typename Best, bool statistics>
__device__ void RowSampler<T, Best, statistics>::merge_list(float threshold) {
  best_.merge(s_.select, a_.pieces, state_);
  Word64 kept = 0, kept_distance = 0;
  const uint32_t listed = searches() ? state_.listed : 0;
  for (uint32_t base = 0; base < listed; base += sampler_threads) {
    const uint32_t i = base + threadIdx.x;
    const float z = i < listed ? list_z_[i] : -infinity;
    if (z >= threshold) {
      best_.offer(list_key_[i]);
      const float weight = exp_nonpositive(z - z_max_);
      if (statistics && min_p_keeps(weight)) {
        kept += FixedPoint(weight).value();
        kept_distance += FixedPoint(times_distance(weight, z)).value();
      }
    }
    best_.end_step(s_.select);
  }
  __syncthreads();
  if (!statistics) return;
  kept_ = state_.sums[sum_kept] + block_sum(kept, s_.select.warp_sums);
  __syncthreads();
  kept_distance_ = state_.sums[sum_distance] + block_sum(kept_distance, s_.select.warp_sums);
}

// ---- Host.

// The parts of the workspace; with memory = nullptr only its size.
struct SampleWorkspace {
  Word64* maxima = nullptr;
  float* masses = nullptr;
  RowState* state = nullptr;
  unsigned* rows_done = nullptr;
  float* list_z = nullptr;
  Word64* list_key = nullptr;
  Word64* candidates = nullptr;  // [rows, pieces, BestMany::published_by(k)]
  int64_t bytes = 0;
  int32_t list_capacity = 0;

  // many_k: of BestMany, or 0.
  SampleWorkspace(void* memory, int64_t rows, int64_t vocabulary, int64_t many_k, const Filters& filters);

  static bool searches_count(const Filters& f, int64_t vocabulary) {
    return !f.greedy() && f.top_k > 0 && f.top_k < vocabulary;
  }
  static bool searches_mass(const Filters& f) { return !f.greedy() && f.top_p < 1.0; }
  // Pieces of the second launch: one block for each multiprocessor of an H100.
  static Pieces pieces(int64_t rows, int64_t vocabulary) {
    const int64_t wanted_blocks = rows <= 66 ? 132 : 4 * 132;
    return Pieces(rows, vocabulary, wanted_blocks, /*min_tokens=*/sampler_threads * group_tokens, 132);
  }

 private:
  template <typename V>
  V* take(void* memory, int64_t count) {
    V* part = reinterpret_cast<V*>(reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes));
    bytes += divide_up(count * static_cast<int64_t>(sizeof(V)), 256) * 256;
    return part;
  }
};

inline SampleWorkspace::SampleWorkspace(void* memory, int64_t rows, int64_t vocabulary, int64_t many_k,
                                        const Filters& filters) {
  if (rows < 1 || vocabulary < 1) return;  // refused later
  maxima = take<Word64>(memory, rows * Pieces::for_max(rows, vocabulary).count);
  if (searches_mass(filters)) masses = take<float>(memory, rows * Pieces::for_max(rows, vocabulary).count);
  if (filters.greedy() && many_k == 0) return;
  state = take<RowState>(memory, rows);
  rows_done = take<unsigned>(memory, 1);
  candidates = take<Word64>(memory, many_k == 0 ? 0 : rows * pieces(rows, vocabulary).count *
                                                           BestMany::published_by(static_cast<int>(many_k)));
  if (!searches_count(filters, vocabulary) && !searches_mass(filters)) return;
  const int64_t capacity = rows <= 128 ? 16384 : rows <= 1024 ? 8192 : min_sampled_vocabulary;
  list_capacity = static_cast<int32_t>(vocabulary < capacity ? vocabulary : capacity);
  list_key = take<Word64>(memory, rows * list_capacity);
  list_z = take<float>(memory, rows * list_capacity);
}

// Of the exponentials that guide the search for top-p; 0 without it.
inline float mass_scale(const Filters& f) {
  return SampleWorkspace::searches_mass(f) ? f.inverse_temperature() * 1.44269504f : 0.0f;
}

template <typename T>
Pieces launch_row_max(const char* name, const Launch& on, const Tensor& logits, const Filters& f,
                      const SampleWorkspace& workspace) {
  const int64_t rows = logits.shape[0], vocabulary = logits.shape[1];
  const Pieces pieces = Pieces::for_max(rows, vocabulary);
  const RowMaxArguments arguments{logits.data,      logits.stride[0], static_cast<int32_t>(vocabulary),
                                  pieces.count,     pieces.groups,    mass_scale(f),
                                  workspace.maxima, workspace.masses, workspace.state,
                                  workspace.rows_done};
  launch(name, row_max_kernel<T>, on, dim3(static_cast<unsigned>(rows * pieces.count)), dim3(row_max_threads),
         sizeof(RowMaxShared), arguments);
  return pieces;
}

inline SampleArguments sample_arguments(const Tensor& logits, const Tensor& positions, const Tensor& seed,
                                        const Filters& f, const SampleWorkspace& workspace) {
  const int64_t rows = logits.shape[0], vocabulary = logits.shape[1];
  const Pieces pieces = SampleWorkspace::pieces(rows, vocabulary);
  SampleArguments a{};
  a.logits = logits.data;
  a.stride = logits.stride[0];
  a.positions = positions.as<const int64_t>();
  a.seed = seed.as<const int64_t>();
  a.vocabulary = static_cast<int32_t>(vocabulary);
  a.max_pieces = Pieces::for_max(rows, vocabulary).count;
  a.pieces = pieces.count;
  a.piece_groups = pieces.groups;
  a.inverse_temperature = f.inverse_temperature();
  a.greedy = f.greedy();
  a.min_p = f.greedy() ? 0.0f : static_cast<float>(f.min_p);
  a.min_p_distance = a.min_p > 0.0f ? std::log(a.min_p) - 1e-2f : 0.0f;
  a.search_count = SampleWorkspace::searches_count(f, vocabulary);
  a.search_mass = SampleWorkspace::searches_mass(f);
  a.top_k = static_cast<double>(f.top_k);
  a.top_p = f.top_p;
  a.bracket_plan = BracketPlan(vocabulary, a.max_pieces, /*short_list=*/workspace.list_capacity / 4, f.top_k, f.top_p,
                               a.inverse_temperature);
  a.list_capacity = workspace.list_capacity;
  a.mass_scale = mass_scale(f);
  a.maxima = workspace.maxima;
  a.masses = workspace.masses;
  a.state = workspace.state;
  a.list_z = workspace.list_z;
  a.list_key = workspace.list_key;
  return a;
}

}  // namespace specbranch::cuda

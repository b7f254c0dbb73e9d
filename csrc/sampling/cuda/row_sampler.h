// The second launch of verify and draft_sample: the kept tokens with the largest scaled logit + noise.
//
// A row is cut into segments, one block each. A block
//   1. merges what the first launch found: the row's largest logit, and scores of a few tokens as the first floor that
//      a candidate must beat;
//   2. with top-k or top-p on, guesses a bracket around their threshold from a sample of the row;
//   3. goes over its segment once. It sums the weights of the row and of the tokens above the bracket, lists the tokens
//      inside it with their scores in the workspace, and keeps the best of those above it, which are surely kept.
// The block of a row that ends last finds the exact threshold among the listed tokens and merges the candidates. Where
// the bracket misled, it searches the row itself and then goes over all of it as in step 3.
//
// Why so: a sort or a radix select over the row would go over it four times, and the blocks of a row would have to wait
// for each other in between. Here a token costs one exponential (with top-p or statistics) and, if it may win, noise.
// Noise is dense where most tokens may win (one Philox block for the four tokens of a thread), and sparse where the
// filters leave few: these are collected until there is one for every lane of a warp. Two logarithms are spent only on
// tokens whose random word allows a score above the floor (the test of sampling/cpu/scan.h).
//
// Lower bound: the logits' bytes twice, the second time from the L2 cache. Instructions a token (sm_90): 45 with top-p,
// 33 of them for the weight; 40 without filters, 23 of them for Philox and the test.
//
// Steps 1 and 2 are in start.h, step 3 in scan.h, the last block's part in merge.h,
// the host's in launch.h.
#pragma once

#include "core/cuda/tickets.h"
#include "sampling/cuda/bracket.h"
#include "sampling/cuda/candidates.h"
#include "sampling/cuda/row_max.h"
#include "sampling/filters.h"

namespace specbranch::cuda {

struct SampleArguments {
  const void* logits;
  int64_t stride;
  AllowedRows allowed;
  const int64_t* positions;
  const int64_t* seed;
  bool seed_by_row;  // else one for all rows
  int32_t vocabulary;
  int32_t max_segments;              // of the first launch
  int32_t segments, segment_groups;  // of this one
  int32_t list_capacity;
  RowFilters filters;
  FiltersInMemory filters_in_memory;  // or none: what `filters` comes from
  // Workspace.
  const Word64* maxima;  // [rows, max_segments]
  const float* masses;   // [rows, max_segments], see row_max.h
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
  RowFilters filters;         // where they are in memory
  bool is_last;
  typename Best::Shared best;
};

// The filters of the block's row. By all threads.
template <bool in_memory>
__device__ const RowFilters& row_filters(const SampleArguments& a, RowFilters& shared) {
  if (!in_memory) return a.filters;
  if (threadIdx.x == 0) {
    const Filters& given = a.filters_in_memory.of_row(blockIdx.x / static_cast<unsigned>(a.segments));
    shared = RowFilters(in_range(given), a.vocabulary, a.max_segments, a.list_capacity);
  }
  __syncthreads();
  return shared;
}

template <typename Row, typename Best, bool statistics>
class RowSampler {
 public:
  using Shared = SamplerShared<Best>;

  __device__ RowSampler(const SampleArguments& arguments, const RowFilters& filters, Shared& shared, const Best& best,
                        int k)
      : a_(arguments),
        f_(filters),
        s_(shared),
        best_(best),
        k_(k),
        row_index_(blockIdx.x / static_cast<unsigned>(arguments.segments)),
        segment_(static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(arguments.segments))),
        row_(arguments.logits, arguments.stride, arguments.allowed, row_index_, arguments.vocabulary),
        state_(arguments.state[row_index_]),
        list_z_(arguments.list_z + row_index_ * arguments.list_capacity),
        list_key_(arguments.list_key + row_index_ * arguments.list_capacity),
        noise_key_{static_cast<uint64_t>(arguments.seed[arguments.seed_by_row ? row_index_ : 0]),
                   static_cast<uint64_t>(arguments.positions[row_index_])} {}

  // True in the one block that is to write the row's result; all its candidates are then in best(), after a barrier.
  __device__ bool run();

  __device__ int64_t row_index() const { return row_index_; }
  __device__ bool is_usable() const { return usable_; }
  __device__ Best& best() { return best_; }
  __device__ float z(int32_t token) const { return row_[token] * f_.inverse_temperature; }
  __device__ float z_max() const { return z_max_; }
  // What top-k and top-p keep has this z or more.
  __device__ float threshold() const { return threshold_; }
  // Sums over all kept tokens, in units of 2^-40: of weights, and of weights times z_max - z.
  __device__ Word64 kept() const { return kept_; }
  __device__ Word64 kept_distance() const { return kept_distance_; }

 private:
  using Reader = GroupReader<Row, sampler_threads>;

  // The entries of the row's list, or of the row.
  struct Entries {
    const RowSampler& sampler;
    bool from_row, mass;
    uint32_t listed;

    __device__ uint32_t count() const { return from_row ? static_cast<uint32_t>(sampler.a_.vocabulary) : listed; }
    __device__ float z(uint32_t i) const { return from_row ? sampler.z(static_cast<int32_t>(i)) : sampler.list_z_[i]; }
    __device__ Word64 key(uint32_t i) const { return ordered(z(i)); }
    __device__ Word64 weight(uint32_t i) const { return mass ? sampler.weight(z(i)) : 1; }
  };

  __device__ bool searches() const { return f_.search_count || f_.search_mass; }
  __device__ bool min_p_keeps(float weight) const { return f_.min_p == 0.0f || weight >= f_.min_p; }
  __device__ Word64 weight(float z) const { return FixedPoint(exp_nonpositive(z - z_max_)).value(); }
  // Less than 1.
  __device__ float times_distance(float weight, float z) const { return weight * fminf(z_max_ - z, 88.0f); }

  __device__ Word64 candidate(int32_t token, float z) const {
    if (!(z >= lowest_finite)) return 0;
    if (f_.min_p > 0.0f && !(exp_nonpositive(z - z_max_) >= f_.min_p)) return 0;
    return candidate_key(f_.greedy ? z : z + token_noise(noise_key_, token), token);
  }

  __device__ void find_start();
  __device__ Bracket guess_bracket(const ThreadSample& sample);
  __device__ void scan(Reader reader, Group next, uint32_t first_token, int32_t steps, const Bracket& bracket);
  __device__ void evaluate(bool active, int32_t token, float z, const Bracket& bracket);
  __device__ void flush(const MassSum (&masses)[sum_count], uint32_t above);
  __device__ bool publish();
  __device__ bool find_threshold(const Bracket& bracket, float& threshold);
  __device__ void merge_list(float threshold);

  const SampleArguments& a_;
  const RowFilters& f_;
  Shared& s_;
  Best best_;
  const int k_;
  const int64_t row_index_;
  const int32_t segment_;
  const Row row_;
  RowState& state_;
  float* const list_z_;
  Word64* const list_key_;
  const NoiseKey noise_key_;
  bool usable_ = false;
  float z_max_ = 0.0f, threshold_ = lowest_finite;
  Word64 kept_ = 0, kept_distance_ = 0;
};

template <typename Row, typename Best, bool statistics>
__device__ bool RowSampler<Row, Best, statistics>::run() {
  const int thread = static_cast<int>(threadIdx.x);
  int32_t begin = segment_ * a_.segment_groups, groups = min(row_.groups() - begin, a_.segment_groups);
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
  usable_ = usable(s_.max_key, f_.inverse_temperature);
  if (!usable_ || (!statistics && f_.greedy)) return segment_ == 0;  // without noise the largest logit is the best
  z_max_ = key_score(s_.max_key) * f_.inverse_temperature;

  Bracket bracket{lowest_finite, infinity};
  if (sampled) {
    bracket = guess_bracket(sample);
  } else if (!searches()) {  // all that is not masked, or hopeless for min-p
    bracket.low = bracket.top = f_.min_p > 0.0f ? fmaxf(z_max_ + f_.min_p_distance, lowest_finite) : lowest_finite;
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

// Adds what this block found to the row's state; true in the block of the row that does so last.
template <typename Row, typename Best, bool statistics>
__device__ bool RowSampler<Row, Best, statistics>::publish() {
  best_.publish(s_.select, segment_, state_);
  __syncthreads();
  if (warp_index() == 0) {
    if (lane_index() < sum_count) {
      Word64 sum = 0;
      for (int w = 0; w < sampler_warps; ++w) sum += s_.sums[lane_index()][w];
      if (sum != 0) atomicAdd(&state_.sums[lane_index()], sum);
    }
    __syncwarp();
    if (lane_index() == 0) s_.is_last = takes_last_ticket(&state_.finished, static_cast<unsigned>(a_.segments));
  }
  __syncthreads();
  return s_.is_last;
}

}  // namespace specbranch::cuda

#include "sampling/cuda/merge.h"
#include "sampling/cuda/scan.h"
#include "sampling/cuda/start.h"

// The best candidates that a block has found so far, in shared memory. A candidate is a key (logit_row.h); one whose
// key is not above the floor cannot be among the best.
#pragma once

#include "sampling/cuda/row_max.h"
#include "sampling/cuda/threshold.h"

namespace specbranch::cuda {

// Below every candidate; its score is -inf.
constexpr Word64 no_candidate = Word64{0x007FFFFF} << 32;

// The score of a key in shared memory that other threads may raise.
__device__ inline float current_score(const Word64& key) {
  return from_ordered(reinterpret_cast<const volatile uint32_t*>(&key)[1]);
}

// The best one.
class BestOne {
 public:
  struct Shared {
    Word64 best;
  };

  __device__ explicit BestOne(Shared& shared) : s_(shared) {}

  // By one thread, with a barrier before the first offer. `key`: of some candidate, or 0.
  __device__ void start(Word64 key) { s_.best = larger(key, no_candidate); }
  __device__ Word64 best() const { return *const_cast<const volatile Word64*>(&s_.best); }
  __device__ float floor_score() const { return current_score(s_.best); }
  __device__ void offer(Word64 key) {
    if (key > best()) atomicMax(&s_.best, key);
  }
  // By all threads after a step of a pass.
  __device__ void end_step(SelectShared&) {}

  // By all threads: what this block found, for the one that ends last; and in that one, what all have found.
  __device__ void publish(SelectShared&, int, RowState& state) {
    if (threadIdx.x == 0) atomicMax(&state.best, s_.best);
  }
  __device__ void merge(SelectShared&, int, const RowState& state) {
    if (threadIdx.x == 0) offer(state.best);
  }

 private:
  Shared& s_;
};

// The best k, in any order. When the buffer is full, a radix select leaves the best k and raises the floor.
class BestMany {
 public:
  static constexpr int max_k = 256;
  static constexpr int full = 768;              // so many call for a select, which leaves max_k at most
  static constexpr int step_candidates = 2560;  // a step may add so many

  struct Shared {
    Word64 floor;
    unsigned count;
    int full_in_step[2];  // a thread can be one step ahead of others that have yet to look: hence two
    Word64 keys[full + step_candidates];
    Word64 kept[max_k];
  };

  // published: [blocks of the row, published_by(k)].
  __device__ BestMany(Shared& shared, int k, Word64* published) : s_(shared), k_(k), step_(0), published_(published) {}
  __host__ __device__ static int published_by(int k) { return k < warp_size ? warp_size : k; }

  // By one thread, with a barrier before the first offer. `key`: of the k-th best of some candidates, or 0.
  __device__ void start(Word64 key) {
    s_.floor = key == 0 ? no_candidate : key - 1;
    s_.count = 0;
    s_.full_in_step[0] = s_.full_in_step[1] = -1;
  }
  __device__ float floor_score() const { return current_score(s_.floor); }
  __device__ void offer(Word64 key) {
    if (key <= s_.floor) return;
    const unsigned at = atomicAdd(&s_.count, 1u);
    s_.keys[at] = key;
    if (at >= full) s_.full_in_step[step_ & 1] = step_;
  }
  // By all threads after a step of a pass.
  __device__ void end_step(SelectShared& select) {
    __syncthreads();
    if (s_.full_in_step[step_ & 1] == step_) prune(select);
    ++step_;
  }

  __device__ void publish(SelectShared& select, int block, RowState&) {
    const int slots = published_by(k_);
    if (count() > slots) prune(select);
    for (int i = static_cast<int>(threadIdx.x); i < slots; i += sampler_threads) {
      published_[static_cast<int64_t>(block) * slots + i] = i < count() ? s_.keys[i] : 0;
    }
  }
  __device__ void merge(SelectShared& select, int blocks, const RowState&) {
    __syncthreads();
    if (threadIdx.x == 0) s_.count = 0;
    __syncthreads();
    const int all = blocks * published_by(k_);
    for (int base = 0; base < all; base += sampler_threads) {
      const int i = base + static_cast<int>(threadIdx.x);
      if (i < all) offer(published_[i]);
      end_step(select);
    }
  }

  // By all threads, between barriers: leaves the best k.
  __device__ void prune(SelectShared& select) {
    const Entries entries{s_.keys, s_.count};
    if (entries.count() <= static_cast<unsigned>(k_)) return;
    Word64 most = 0, least = ~Word64{0};
    for (unsigned i = threadIdx.x; i < entries.count(); i += sampler_threads) {
      most = larger(most, s_.keys[i]);
      least = s_.keys[i] < least ? s_.keys[i] : least;
    }
    most = block_max(most, select.warp_sums);
    __syncthreads();
    least = ~block_max(~least, select.warp_sums);
    __syncthreads();
    Word64 above = 0, cut = 0;
    radix_select(select, entries, least, most, above, k_, /*stop_when_exact=*/true, cut);
    if (threadIdx.x == 0) {
      s_.count = 0;
      s_.floor = cut - 1;
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < entries.count(); i += sampler_threads) {
      if (s_.keys[i] >= cut) s_.kept[atomicAdd(&s_.count, 1u)] = s_.keys[i];
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < s_.count; i += sampler_threads) s_.keys[i] = s_.kept[i];
    __syncthreads();
  }

  // Between barriers.
  __device__ int count() const { return static_cast<int>(s_.count); }
  __device__ const Word64* keys() const { return s_.keys; }

 private:
  struct Entries {
    const Word64* keys;
    unsigned size;

    __device__ uint32_t count() const { return size; }
    __device__ Word64 key(uint32_t i) const { return keys[i]; }
    __device__ Word64 weight(uint32_t) const { return 1; }
  };

  Shared& s_;
  int k_, step_;
  Word64* published_;
};

}  // namespace specbranch::cuda

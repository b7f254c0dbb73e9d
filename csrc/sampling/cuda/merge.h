// Part of row_sampler.h: what the block of a row that ends last does with what all of them found.
#pragma once

namespace specbranch::cuda {

// The exact threshold of top-k and top-p; false when it had to be searched in the row, because the list lacks tokens.
template <typename Row, typename Best, bool statistics>
__device__ bool RowSampler<Row, Best, statistics>::find_threshold(const Bracket& bracket, float& threshold) {
  const uint32_t listed = state_.listed;
  bool from_row = listed > static_cast<uint32_t>(a_.list_capacity);
#pragma unroll 1
  for (int mass = f_.search_count ? 0 : 1; mass <= (f_.search_mass ? 1 : 0); ++mass) {
    const Word64 lowest = ordered(threshold), highest = ordered(z_max_);
    Word64 lo = ordered(bracket.low), hi = bracket.top < infinity ? ordered(bracket.top) - 1 : highest;
    Word64 above = state_.sums[sum_above];
    double target = f_.top_k;
    if (mass != 0) {
      Word64 all = state_.sums[sum_all];
      if (f_.search_count) {  // top-p of what top-k kept
        lo = lowest;
        all = 0;
        const Entries entries{*this, from_row, true, listed};
        for (uint32_t i = threadIdx.x; i < entries.count(); i += sampler_threads) {
          if (entries.z(i) >= threshold) all += entries.weight(i);
        }
        all = block_sum(all, s_.select.warp_sums);
        __syncthreads();
      }
      target = f_.top_p * static_cast<double>(all);
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
template <typename Row, typename Best, bool statistics>
__device__ void RowSampler<Row, Best, statistics>::merge_list(float threshold) {
  best_.merge(s_.select, a_.segments, state_);
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

}  // namespace specbranch::cuda

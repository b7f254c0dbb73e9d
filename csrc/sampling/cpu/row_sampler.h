// The k best tokens of every row by perturbed score: the passes of row_max.h, threshold.h and scan.h over
// segments of rows, shared among threads.
#pragma once

#include "core/cpu/memory.h"
#include "sampling/cpu/row_filters.h"
#include "sampling/cpu/row_max.h"
#include "sampling/cpu/scan.h"
#include "sampling/cpu/threshold.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

// Below this many logits one thread takes all rows: 15 to 180 microseconds of work for one row, and with top-p up to
// 600 for 64 rows of 2048. Why not earlier: see linear.cpp.
constexpr int64_t min_parallel_logits = int64_t{1} << 17;

struct SampleRequest {
  const Tensor* logits;
  const int64_t* positions;
  const int64_t* seeds;  // one, or one for each row
  bool seed_by_row;
  const Filters* filters;  // likewise
  bool filters_by_row;
  int64_t k;        // 0: draw nothing, only find what the filters keep
  bool statistics;  // fill mass and entropy
  int threads;
  const Tensor* more_logits = nullptr;  // rows that follow those of `logits`, of the same dtype and length
  const int64_t* parents = nullptr;     // of verify: rows of unused nodes are skipped, not reported, if need be
  bool reports = true;                  // else any row is skipped rather than reported
  const Tensor* allowed = nullptr;      // or all tokens are; row i of more_logits has row i of it too
};

struct RowSample {
  int64_t count;  // candidates found, at most k
  float z_max;
  double mass, entropy;  // of the kept tokens, weighted by exp(z - z_max)

  double probability(float z) const { return exp_nonpositive(z - z_max) / mass; }
};

// Row: a LogitRow.
template <typename Row>
class RowSampler {
 public:
  RowSampler(const SampleRequest& request, Candidate* candidates, RowSample* samples)
      : r_(request),
        first_rows_(request.logits->shape[0]),
        rows_(first_rows_ + (request.more_logits != nullptr ? request.more_logits->shape[0] : 0)),
        vocabulary_(request.logits->shape[1]),
        segments_(vocabulary_),
        row_(rows_),
        filters_(request.filters_by_row ? rows_ : 1),
        segment_(rows_ * segments_.count),
        partial_(rows_ * segments_.count * request.k),
        partial_count_(rows_ * segments_.count),
        candidates_(candidates),
        samples_(samples) {
    for (int64_t i = 0; i < rows_; ++i) {
      new (row_.at(i)) RowState{};
      row_[i].pending.store(segments_.count, std::memory_order_relaxed);
    }
    bool search_mass = false;
    for (int64_t i = 0; i < (request.filters_by_row ? rows_ : 1); ++i) {
      const RowFilters& f = *new (filters_.at(i)) RowFilters(request.filters[i], vocabulary_);
      if (!found_by_maximum(i)) scans_ = true;
      if (f.search_count) search_count_ = true;
      if (f.search_mass) search_mass = true;
      if (f.search_mass && !f.search_count) mass_pass_ = true;
    }
    if (search_count_ || search_mass) {
      list_z_.at_least(2 * rows_ * vocabulary_);
      list_token_.at_least(rows_ * vocabulary_);
    }
  }

  RowReport run() {
    const int64_t tasks = rows_ * segments_.count;
    const bool small = rows_ * vocabulary_ < min_parallel_logits;
    const int threads = small ? 1 : static_cast<int>(std::min<int64_t>(r_.threads, tasks));
#pragma omp parallel num_threads(threads)
    {
      // The flags are set within one pass and read after it, so all threads take the same way.
      pass([](int64_t) { return true; },
           [&](int64_t i, int64_t s) {
             const int64_t begin = segments_.begin(s), end = segments_.end(s);
             segment_max(logits(i), begin, end, segment(i, s));
             if (filters(i).guesses_mass) {
               segment_mass(logits(i), begin, end, filters(i).inverse_temperature, segment(i, s));
             }
           },
           [&](int64_t i) { start_row(i); });
      if (!failed_ && scans_) {
        if (search_count_) search<Weight::count>();
        if (mass_pass_) search<Weight::mass>();
        if (r_.k > 0) {
          pass([&](int64_t i) { return !found_by_maximum(i); }, [&](int64_t i, int64_t s) { scan(i, s); },
               [&](int64_t i) { finish_row(i); });
        }
      }
    }
    for (int64_t i = 0; i < rows_; ++i) {
      if (row_[i].problem != RowReport::none && counts(i)) return {i, row_[i].problem};
    }
    return {};
  }

  Row logits(int64_t i) const {
    return i < first_rows_ ? Row(*r_.logits, r_.allowed, i) : Row(*r_.more_logits, r_.allowed, i - first_rows_);
  }
  // After run(): rows without a problem.
  Keep keep(int64_t i) { return {filters(i).inverse_temperature, row_[i].threshold, row_[i].z_max, filters(i).min_p}; }
  int64_t argmax(int64_t i) { return row_[i].argmax; }

 private:
  SegmentState& segment(int64_t i, int64_t s) { return segment_[i * segments_.count + s]; }
  float* list_z(int64_t i) { return list_z_.at(i * vocabulary_); }
  int32_t* list_token(int64_t i) { return list_token_.at(i * vocabulary_); }
  const RowFilters& filters(int64_t i) { return filters_[r_.filters_by_row ? i : 0]; }
  // Whether a problem of the row is one of the call.
  bool counts(int64_t i) const { return r_.reports && (r_.parents == nullptr || counts_in_tree(r_.parents, i)); }
  // At temperature 0 the largest logit is the token.
  bool found_by_maximum(int64_t i) { return filters(i).greedy && r_.k <= 1 && !r_.statistics; }
  NoiseKey key(int64_t i) const {
    return {static_cast<uint64_t>(r_.seeds[r_.seed_by_row ? i : 0]), static_cast<uint64_t>(r_.positions[i])};
  }

  // Calls body(row, segment) for all segments of rows that it is for, and finish(row) right after the last one of each.
  // One barrier: on a busy machine a barrier can cost a whole time slice.
  template <typename IsFor, typename Body, typename Finish>
  void pass(IsFor is_for, Body body, Finish finish) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < rows_ * segments_.count; ++task) {
      const int64_t i = task / segments_.count;
      if (row_[i].problem != RowReport::none || !is_for(i)) continue;
      body(i, task % segments_.count);
      if (row_[i].pending.fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
      row_[i].pending.store(segments_.count, std::memory_order_relaxed);
      finish(i);
    }
  }

  void start_row(int64_t i) {
    RowState& row = row_[i];
    const RowFilters& f = filters(i);
    int64_t best = 0;
    bool nan = segment(i, 0).nan;
    for (int64_t s = 1; s < segments_.count; ++s) {
      if (segment(i, s).max_logit > segment(i, best).max_logit) best = s;
      nan |= segment(i, s).nan;
    }
    const float max_logit = segment(i, best).max_logit;
    row.z_max = max_logit * f.inverse_temperature;
    row.problem = nan                       ? RowReport::nan
                  : max_logit == HUGE_VALF  ? RowReport::infinite
                  : row.z_max == -HUGE_VALF ? RowReport::all_masked
                  : row.z_max == HUGE_VALF  ? RowReport::overflow
                                            : RowReport::none;
    if (row.problem != RowReport::none) {
      if (counts(i)) failed_ = true;
      return;
    }
    row.threshold = lowest_finite;
    row.argmax = find_logit(logits(i), segments_.begin(best), segments_.end(best), max_logit);
    // The largest logit is always kept, so its score is a first bar.
    const float floor = r_.k != 1 ? -HUGE_VALF : f.greedy ? row.z_max : row.z_max + token_noise(key(i), row.argmax);
    row.score_floor.store(floor, std::memory_order_relaxed);
    if (f.guesses_mass) {
      row.mass = 0.0f;
      for (int64_t s = 0; s < segments_.count; ++s) {
        const float distance = (segment(i, s).max_logit - max_logit) * f.inverse_temperature;
        row.mass += segment(i, s).mass * exp_nonpositive(distance);
      }
    }
    if (f.search_count) {
      set_bracket<Weight::count>(i);
    } else if (f.search_mass) {
      set_bracket<Weight::mass>(i);
    }
    if (f.greedy && r_.k == 1) {
      candidates_[i] = {row.z_max, row.z_max, row.argmax};
      samples_[i].count = 1;
    }
  }

  template <Weight weight>
  void set_bracket(int64_t i) {
    RowState& row = row_[i];
    const RowFilters& f = filters(i);
    Bracket bracket = whole_row;
    if (vocabulary_ > short_list && (weight == Weight::count || f.guesses_mass)) {
      const float bins_per_unit = weight == Weight::count ? 32.0f : mass_bins(vocabulary_, row.mass, f.top_p);
      const SampledHistogram sample(logits(i), vocabulary_, f.inverse_temperature, row.z_max, bins_per_unit);
      bracket = weight == Weight::count ? bracket_count(sample, row.z_max, f.top_k)
                                        : bracket_mass(sample, row.z_max, row.threshold, row.mass, f.top_p);
    }
    row.low = bracket.low;
    row.high = bracket.high;
  }

  // Raises every row's threshold to what top-k or top-p keeps.
  template <Weight weight>
  void search() {
    pass([&](int64_t i) { return weight == Weight::count ? filters(i).search_count : filters(i).search_mass; },
         [&](int64_t i, int64_t s) {
           if (!row_[i].listed_all) gather<weight>(i, s, {row_[i].low, row_[i].high});
         },
         [&](int64_t i) {
           if (weight == Weight::mass && row_[i].listed_all) return;  // done with the search for top-k
           select<weight>(i);
           if (weight == Weight::mass || !filters(i).search_mass) return;
           if (row_[i].listed_all) {
             select<Weight::mass>(i);
           } else {
             set_bracket<Weight::mass>(i);
             mass_pass_ = true;
           }
         });
  }

  template <Weight weight>
  void gather(int64_t i, int64_t s, Bracket bracket) {
    const int64_t begin = segments_.begin(s);
    segment_gather<weight>(logits(i), begin, segments_.end(s), filters(i).inverse_temperature, row_[i].z_max,
                           row_[i].threshold, bracket, segment(i, s), list_z(i) + begin, list_token(i) + begin);
  }

  // Moves the segments' lists together; returns the weight above the bracket and of the whole row.
  void join_lists(int64_t i, uint64_t& above, uint64_t& total) {
    RowState& row = row_[i];
    row.listed = 0;
    above = total = 0;
    for (int64_t s = 0; s < segments_.count; ++s) {
      const SegmentState& state = segment(i, s);
      std::memmove(list_z(i) + row.listed, list_z(i) + segments_.begin(s), sizeof(float) * state.listed);
      std::memmove(list_token(i) + row.listed, list_token(i) + segments_.begin(s), sizeof(int32_t) * state.listed);
      row.listed += state.listed;
      above += state.weight_above;
      total += state.weight_total;
    }
  }

  template <Weight weight>
  void select(int64_t i) {
    RowState& row = row_[i];
    uint64_t above = 0, total = 0;
    const auto target = [&] {
      return weight == Weight::count ? filters(i).top_k : filters(i).top_p * static_cast<double>(total);
    };
    if (row.listed_all) {  // an earlier search listed the row; what it dropped leaves the list first
      int64_t kept = 0;
      for (int64_t j = 0; j < row.listed; ++j) {
        if (list_z(i)[j] < row.threshold) continue;
        list_z(i)[kept] = list_z(i)[j];
        list_token(i)[kept++] = list_token(i)[j];
      }
      row.listed = kept;
      for (int64_t j = 0; j < kept; ++j) total += fixed_point(exp_nonpositive(list_z(i)[j] - row.z_max));
      row.low = row.threshold;
      row.high = HUGE_VALF;
    } else {
      join_lists(i, above, total);
    }
    for (;;) {
      bool complete = false;
      const float found = search_list<weight>(list_z(i), row.listed, row.z_max, above, target(),
                                              list_z_.at((rows_ + i) * vocabulary_), complete);
      const bool has_all_below = row.low <= row.threshold;
      const bool has_all_above = row.high == HUGE_VALF;
      if ((has_all_above || static_cast<double>(above) < target()) && (!complete || has_all_below)) {
        row.listed_all = has_all_above;
        if (!complete) row.threshold = found;
        return;
      }
      row.low = whole_row.low;
      row.high = whole_row.high;
      for (int64_t s = 0; s < segments_.count; ++s) gather<weight>(i, s, whole_row);
      join_lists(i, above, total);
    }
  }

  void scan(int64_t i, int64_t s) {
    Best best(partial_.at((i * segments_.count + s) * r_.k), r_.k);
    const int64_t begin = segments_.begin(s), end = segments_.end(s);
    RowState& row = row_[i];
    if (filters(i).greedy) {
      segment_greedy_scan(logits(i), begin, end, row.score_floor, best);
    } else if (!row.listed_all) {
      segment_noise_scan(logits(i), begin, end, keep(i), key(i), NoiseWords(key(i)), row.score_floor, best);
    } else if (s == 0) {
      list_noise_scan(list_z(i), list_token(i), row.listed, keep(i), key(i), best);
    }
    partial_count_[i * segments_.count + s] = best.size();
    if (r_.statistics) segment_statistics(logits(i), begin, end, keep(i), segment(i, s));
  }

  void finish_row(int64_t i) {
    Best best(candidates_ + i * r_.k, r_.k);
    uint64_t mass = 0;
    double mass_times_distance = 0.0;
    for (int64_t s = 0; s < segments_.count; ++s) {
      const int64_t part = i * segments_.count + s;
      for (int64_t j = 0; j < partial_count_[part]; ++j) best.offer(partial_[part * r_.k + j]);
      mass += segment_[part].kept_mass;
      mass_times_distance += segment_[part].kept_mass_times_distance;
    }
    samples_[i].count = best.size();
    if (!r_.statistics) return;
    samples_[i].z_max = row_[i].z_max;
    samples_[i].mass = static_cast<double>(mass) * two_to_minus_40;
    samples_[i].entropy = std::log(samples_[i].mass) + mass_times_distance / samples_[i].mass;
  }

  const SampleRequest& r_;
  const int64_t first_rows_, rows_, vocabulary_;
  const Segments segments_;
  Buffer<RowState> row_;
  Buffer<RowFilters> filters_;                 // of each row, or one for all
  bool scans_ = false, search_count_ = false;  // whether any row does
  Buffer<SegmentState> segment_;
  Buffer<float> list_z_;  // the second half is scratch of the searches
  Buffer<int32_t> list_token_;
  Buffer<Candidate> partial_;
  Buffer<int64_t> partial_count_;
  std::atomic<bool> failed_{false}, mass_pass_{false};
  Candidate* candidates_;  // [rows, k]
  RowSample* samples_;     // [rows]
};

inline RowReport sample_rows(const SampleRequest& request, Candidate* candidates, RowSample* samples) {
  return with_row_type(request.logits->dtype, request.allowed != nullptr,
                       [&](auto row) { return RowSampler<decltype(row)>(request, candidates, samples).run(); });
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

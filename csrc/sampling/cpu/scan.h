// The last pass over a row: the k kept tokens with the largest scaled logit + noise.
//
// The exact noise costs two logarithms, so it is computed only for tokens that may still enter: noise g of word x
// is at most -log(v) with v >= x / 2^32, so token t can reach score s only if x / 2^32 <= exp(z - s). The right
// side is bounded from above by a few integer operations, with slack for every rounding. The result is exactly
// that of scoring all tokens.
#pragma once

#include <cmath>

#include "core/cpu/philox_simd.h"
#include "sampling/cpu/candidates.h"
#include "sampling/cpu/fixed_point.h"
#include "sampling/cpu/row_state.h"

namespace specbranch {
inline namespace SPECBRANCH_ISA {

// Which tokens the filters keep, and how logits are scaled.
struct Keep {
  float inverse_temperature, threshold, z_max, min_p;

  bool operator()(float z) const { return z >= threshold && (min_p == 0.0f || exp_nonpositive(z - z_max) >= min_p); }
  // No kept token lies below this.
  float lowest() const {
    const float min_p_bound = min_p == 0.0f ? lowest_finite : z_max + std::log(min_p) - 1e-2f;
    return min_p_bound > threshold ? min_p_bound : threshold;
  }
};

// An upper bound of 2^31 * exp(z - score), and the words it is compared to.
class Reach {
 public:
  explicit Reach(float score) : base_(score - (2e-3f + 1e-6f * std::fabs(score))) {
    if (score == -HUGE_VALF) base_ = -HUGE_VALF;
  }

  // Lanes whose token may score at least `score`. Wrongly set ones cost time only.
  IntVec operator()(FloatVec z, UintVec words) const {
    constexpr float octave = 8388608.0f;  // 2^23: one in the exponent field
    // Reading the bits of a linear function as a float gives a chord of 2^y, which lies above it.
    const FloatVec bits =
        min((z - base_) * (octave * 1.44269504f) + octave * (127 + 31), broadcast(octave * (127 + 32)));
    const FloatVec bound = (FloatVec) __builtin_convertvector(bits, IntVec);
    return (IntVec)(__builtin_convertvector((IntVec)(words >> 1), FloatVec) <= bound);
  }
  bool operator()(float z, uint32_t word) const {
    return z >= base_ || static_cast<float>(word) * two_to_minus_32 <= exp_nonpositive(z - base_);
  }

 private:
  float base_;
};

// Raises `shared` to `value`; other threads' tokens then need not beat less.
inline void raise(std::atomic<float>& shared, float value) {
  float seen = shared.load(std::memory_order_relaxed);
  while (value > seen && !shared.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

// Sums over kept tokens of w and of w * (z_max - z): what confidence and entropy need.
template <typename Row>
void segment_statistics(const Row& row, int64_t begin, int64_t end, const Keep& keep, SegmentState& out) {
  MassSum mass;
  uint64_t rest = 0;
  double weighted = 0.0;
  int64_t t = begin;
  while (t + simd_width <= end) {
    FloatVec sum{};  // float32 for a few dozen terms only
    const int64_t stop = t + 64 * simd_width < end ? t + 64 * simd_width : end;
    t = each_vector(row, t, stop, [&](int64_t at, int i) {
      const FloatVec z = row.vector(at, i) * keep.inverse_temperature, d = z - keep.z_max;
      const FloatVec w = exp_nonpositive(d);
      const IntVec kept = (IntVec)(z >= keep.threshold) & (IntVec)(w >= keep.min_p);
      mass.add(FixedPointVec(w), kept);
      sum -= select(kept & (IntVec)(w > 0.0f), w * d, FloatVec{});
    });
    weighted += reduce_sum(sum);
  }
  for (; t < end; ++t) {
    const float z = row[t] * keep.inverse_temperature;
    const float w = exp_nonpositive(z - keep.z_max);
    if (!(z >= keep.threshold && w >= keep.min_p && w > 0.0f)) continue;
    rest += fixed_point(w);
    weighted -= w * (z - keep.z_max);
  }
  out.kept_mass = mass.total() + rest;
  out.kept_mass_times_distance = weighted;
}

// Offers the kept tokens of a segment to `best`.
template <typename Row>
void segment_noise_scan(const Row& row, int64_t begin, int64_t end, const Keep& keep, const NoiseKey& key,
                        const NoiseWords& noise, std::atomic<float>& score_floor, Best& best) {
  float floor = score_floor.load(std::memory_order_relaxed);
  Reach reach(floor);
  const auto offer = [&](int64_t token) {
    const float z = row[token] * keep.inverse_temperature;
    if (!keep(z)) return;
    best.offer({z + token_noise(key, token), z, token});
    if (best.floor() > floor) {
      raise(score_floor, best.floor());
      floor = score_floor.load(std::memory_order_relaxed);
      reach = Reach(floor);
    }
  };

  const float lowest = keep.lowest();
  int64_t t = begin;
  for (; t + NoiseWords::group <= end; t += NoiseWords::group) {
    if (row.allows_none(t, NoiseWords::group)) continue;
    UintVec words[2];
    noise.get(t, words);
    const FloatVec z0 = row.raw(t) * keep.inverse_temperature;
    const FloatVec z1 = row.raw(t + simd_width) * keep.inverse_temperature;
    const IntVec near0 = reach(z0, words[0]) & (IntVec)(z0 >= lowest);
    const IntVec near1 = reach(z1, words[1]) & (IntVec)(z1 >= lowest);
    if (__builtin_expect(!any(near0 | near1), 1)) continue;
    uint32_t bits = row.only_allowed(t, mask_bits(near0) | mask_bits(near1) << simd_width);
    for (; bits != 0; bits &= bits - 1) offer(t + __builtin_ctz(bits));
  }
  for (; t < end; ++t) offer(t);
}

// The same for a list of tokens and their z.
inline void list_noise_scan(const float* z, const int32_t* tokens, int64_t count, const Keep& keep, const NoiseKey& key,
                            Best& best) {
  const float lowest = keep.lowest();
  float floor = best.floor();
  Reach reach(floor);
  for (int64_t i = 0; i < count; ++i) {
    if (z[i] < lowest || !reach(z[i], key.word(tokens[i], Purpose::gumbel)) || !keep(z[i])) continue;
    best.offer({z[i] + token_noise(key, tokens[i]), z[i], tokens[i]});
    if (best.floor() > floor) {
      floor = best.floor();
      reach = Reach(floor);
    }
  }
}

// At temperature 0 there is no noise: the score is the logit.
template <typename Row>
void segment_greedy_scan(const Row& row, int64_t begin, int64_t end, std::atomic<float>& score_floor, Best& best) {
  float floor = score_floor.load(std::memory_order_relaxed);
  const auto offer = [&](int64_t token, float z) {
    if (!(z >= lowest_finite)) return;
    best.offer({z, z, token});
    if (best.floor() > floor) {
      raise(score_floor, best.floor());
      floor = score_floor.load(std::memory_order_relaxed);
    }
  };
  int64_t t = each_vector(row, begin, end, [&](int64_t at, int i) {
    const FloatVec z = row.raw(at + i);
    uint32_t bits = mask_bits((IntVec)(z >= floor));
    if (__builtin_expect(bits == 0, 1)) return;
    for (bits = row.only_allowed(at + i, bits); bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      offer(at + i + lane, z[lane]);
    }
  });
  for (; t < end; ++t) offer(t, row[t]);
}

}  // namespace SPECBRANCH_ISA
}  // namespace specbranch

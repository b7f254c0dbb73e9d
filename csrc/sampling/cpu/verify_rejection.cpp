// After the filters (row_sampler.h), one pass sums the weights and one the residual: of every row with block
// verification, else of the row where the walk ends. Blocks of tokens without weight are skipped; with filters on that
// is nearly all of them.
#include "sampling/verify_rejection.h"

#include "sampling/cpu/row_sampler.h"

namespace specbranch::cpu::SPECBRANCH_ISA {
namespace {

using namespace rejection;

typedef double DoubleVec __attribute__((vector_size(4 * simd_width)));
typedef float HalfFloatVec __attribute__((vector_size(2 * simd_width)));
typedef int32_t HalfIntVec __attribute__((vector_size(2 * simd_width)));
constexpr int half_width = simd_width / 2;

// One row of logits and the weights of its tokens.
template <typename Row>
struct WeightedRow {
  Row logits;
  Keep keep;
  double scale;  // of the weights, before they are compared

  // No token below this weighs anything: exp(-28) < 2^-40.
  float lowest() const { return std::max(keep.lowest(), keep.z_max - 28.0f); }
  FloatVec z(int64_t t, int i) const { return logits.vector(t, i) * keep.inverse_temperature; }
  // Whatever the mask says: without a token that reaches `lowest`, no vector weighs anything.
  FloatVec raw_z(int64_t t) const { return logits.raw(t) * keep.inverse_temperature; }
  // exp(z - z_max), 0 for what the filters drop.
  FloatVec kept(FloatVec z) const {
    const FloatVec w = exp_nonpositive(z - keep.z_max);
    return select((IntVec)(z >= keep.threshold) & (IntVec)(w >= keep.min_p), w, FloatVec{});
  }
  // floor(2^40 * kept): a float holds it exactly.
  FloatVec weight(FloatVec z) const {
    const FloatVec scaled = kept(z) * two_to_40;
    const FloatVec whole = __builtin_convertvector(__builtin_convertvector(scaled, IntVec), FloatVec);
    return select((IntVec)(scaled < 8388608.0f), whole, scaled);  // from 2^23 on floats are whole
  }
  double scaled(int64_t token) const {
    const float z = logits[token] * keep.inverse_temperature;
    return keep(z) ? scale * static_cast<double>(fixed_point(exp_nonpositive(z - keep.z_max))) : 0.0;
  }
};

template <typename Row>
uint64_t weight_sum(const WeightedRow<Row>& row, int64_t begin, int64_t end) {
  const float lowest = row.lowest();
  MassSum sum;
  uint64_t rest = 0;
  int64_t t = each_vector(row.logits, begin, end, [&](int64_t at, int i) {
    const FloatVec z = row.raw_z(at + i);
    if (any((IntVec)(z >= lowest))) sum.add(FixedPointVec(row.kept(row.logits.mask(at, i, z))));
  });
  for (; t < end; ++t) {
    const float z = row.logits[t] * row.keep.inverse_temperature;
    if (row.keep(z)) rest += fixed_point(exp_nonpositive(z - row.keep.z_max));
  }
  return sum.total() + rest;
}

// The sum of residual_weight over a range. The weights' two 30-bit digits are summed as doubles, which are exact.
template <typename Row>
uint64_t residual_sum(const WeightedRow<Row>& target, const WeightedRow<Row>& draft, int64_t begin, int64_t end) {
  const float lowest = target.lowest();
  DoubleVec high_sum{}, low_sum{};
  uint64_t rest = 0;
  int64_t t = each_vector(target.logits, begin, end, [&](int64_t at, int i) {
    const FloatVec z = target.raw_z(at + i);
    if (!any((IntVec)(z >= lowest))) return;
    const FloatVec target_weight = target.weight(target.logits.mask(at, i, z));
    const FloatVec draft_weight = draft.weight(draft.z(at, i));
    HalfFloatVec a[2], b[2];
    std::memcpy(a, &target_weight, sizeof a);
    std::memcpy(b, &draft_weight, sizeof b);
    for (int half = 0; half < 2; ++half) {
      const DoubleVec excess = target.scale * __builtin_convertvector(a[half], DoubleVec) -
                               draft.scale * __builtin_convertvector(b[half], DoubleVec);
      const DoubleVec scaled = (excess > 0.0 ? excess : DoubleVec{}) * two_to_30;
      const DoubleVec high = __builtin_convertvector(__builtin_convertvector(scaled, HalfIntVec), DoubleVec);
      const DoubleVec rest_scaled = (scaled - high) * two_to_30;
      high_sum += high;
      low_sum += __builtin_convertvector(__builtin_convertvector(rest_scaled, HalfIntVec), DoubleVec);
    }
  });
  for (; t < end; ++t) rest += residual_weight(target.scaled(t), draft.scaled(t));
  for (int i = 0; i < half_width; ++i) {
    rest += (static_cast<uint64_t>(high_sum[i]) << 30) + static_cast<uint64_t>(low_sum[i]);
  }
  return rest;
}

template <typename Row>
class Rejection {
 public:
  Rejection(const VerifyRejectionParams& p, int64_t drafted)
      : p_(p),
        tokens_(p.tokens.as<const int64_t>() + 1),
        drafted_(drafted),
        target_logits_(first_rows(p.target_logits, drafted + 1)),
        draft_logits_(first_rows(p.draft_logits, drafted)),
        request_{&target_logits_,
                 nullptr,
                 nullptr,
                 /*seed_by_row=*/false,
                 &p.filters,
                 /*filters_by_row=*/false,
                 /*k=*/0,
                 /*statistics=*/false,
                 p.launch.threads,
                 &draft_logits_,
                 /*parents=*/nullptr,
                 /*reports=*/true,
                 p.has_allowed ? &p.allowed : nullptr},
        filtered_(request_, nullptr, nullptr),
        segments_(p.target_logits.shape[1]),
        row_(2 * drafted + 1),
        part_((2 * drafted + 1) * segments_.count),
        chance_(drafted) {}

  void run() {
    const RowReport report = filtered_.run();
    *p_.target_report = *p_.draft_report = {};
    if (report.problem != RowReport::none) {
      if (report.row <= drafted_) {
        *p_.target_report = report;
      } else {
        *p_.draft_report = {report.row - drafted_ - 1, report.problem};
      }
      return;
    }
    if (p_.filters.greedy()) {
      int64_t i = 0;
      while (i < drafted_ && tokens_[i] == filtered_.argmax(i) && tokens_[i] == filtered_.argmax(draft_row(i))) ++i;
      return finish(i, filtered_.argmax(i));
    }
    weigh();
    const int64_t accepted = p_.block ? walk_block() : walk();
    finish(accepted, draw(accepted));
  }

 private:
  static Tensor first_rows(Tensor t, int64_t rows) {
    t.shape[0] = rows;
    return t;
  }
  // Rows of the target come first.
  int64_t draft_row(int64_t i) const { return drafted_ + 1 + i; }
  WeightedRow<Row>& target(int64_t i) { return row_[i]; }
  // What the target's row is compared with. Behind the last drawn token nothing: the row itself, times 0.
  WeightedRow<Row> draft(int64_t i) {
    WeightedRow<Row> row = row_[i < drawn_ ? draft_row(i) : i];
    if (i >= drawn_) row.scale = 0.0;
    return row;
  }

  // part_[row, segment] = body(row, begin, end) for some rows.
  template <typename Body>
  void parts(int64_t first, int64_t last, Body body) {
    const int64_t begin = first * segments_.count, end = last * segments_.count;
    const bool small = (end - begin) * segments_.length < min_parallel_logits;
    const int threads = small ? 1 : static_cast<int>(std::min<int64_t>(p_.launch.threads, end - begin));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = begin; task < end; ++task) {
      const int64_t s = task % segments_.count;
      part_[task] = body(task / segments_.count, segments_.begin(s), segments_.end(s));
    }
  }
  void residual_parts(int64_t first, int64_t last) {
    parts(first, last,
          [this](int64_t i, int64_t begin, int64_t end) { return residual_sum(target(i), draft(i), begin, end); });
  }
  uint64_t sum_of_parts(int64_t i) {
    uint64_t sum = 0;
    for (int64_t s = 0; s < segments_.count; ++s) sum += part_[i * segments_.count + s];
    return sum;
  }

  void weigh() {
    const int64_t rows = 2 * drafted_ + 1;
    for (int64_t i = 0; i < rows; ++i) row_[i] = {filtered_.logits(i), filtered_.keep(i), 0.0};
    parts(0, rows, [this](int64_t i, int64_t begin, int64_t end) { return weight_sum(row_[i], begin, end); });
    for (int64_t i = 0; i < rows; ++i) row_[i].scale = 1.0 / static_cast<double>(sum_of_parts(i));
    drawn_ = 0;
    while (drawn_ < drafted_ && row_[draft_row(drawn_)].scaled(tokens_[drawn_]) > 0.0) ++drawn_;
  }

  bool yes(int64_t i, double chance) const {
    const NoiseKey key{seed(), static_cast<uint64_t>(p_.positions.as<const int64_t>()[0])};
    return says_yes(random_integer(key, i, Purpose::accept), chance);
  }
  double next_path_chance(int64_t i) { return path_chance(target(i).scaled(tokens_[i]), draft(i).scaled(tokens_[i])); }

  // Both walks return the number of accepted tokens and leave the parts of that row's residual.
  int64_t walk() {
    int64_t i = 0;
    while (i < drawn_ && yes(i, next_path_chance(i))) ++i;
    residual_parts(i, i + 1);
    return i;
  }
  int64_t walk_block() {
    for (int64_t i = 0; i < drawn_; ++i) {
      chance_[i] = next_path_chance(i);
      if (i + 1 < drawn_) target(i + 1).scale *= chance_[i];
    }
    residual_parts(0, drawn_ + 1);
    int64_t i = drawn_;
    for (; i > 0; --i) {
      if (yes(i - 1, i == drawn_ ? chance_[i - 1] : block_chance(sum_of_parts(i), chance_[i - 1]))) break;
    }
    return i;
  }

  // The first token whose running sum of residual weights passes a uniform integer.
  int64_t draw(int64_t i) {
    const uint64_t sum = sum_of_parts(i);
    if (sum == 0) return filtered_.argmax(i);  // draft and target are equal, so the rejection was rounding
    const NoiseKey key{seed(), static_cast<uint64_t>(p_.positions.as<const int64_t>()[i])};
    uint64_t left = below(sum, random_integer(key, 0, Purpose::residual));
    int64_t s = 0;
    for (; left >= part_[i * segments_.count + s]; ++s) left -= part_[i * segments_.count + s];
    const WeightedRow<Row> against = draft(i);
    int64_t t = segments_.begin(s);
    constexpr int64_t step = 64;
    for (; t + step < segments_.end(s); t += step) {
      const uint64_t part = residual_sum(target(i), against, t, t + step);
      if (left < part) break;
      left -= part;
    }
    for (;; ++t) {
      const uint64_t weight = residual_weight(target(i).scaled(t), against.scaled(t));
      if (left < weight) return t;
      left -= weight;
    }
  }

  uint64_t seed() const { return static_cast<uint64_t>(*p_.seed.as<const int64_t>()); }
  void finish(int64_t accepted, int64_t next_token) {
    *p_.accepted.as<int64_t>() = accepted;
    *p_.next_token.as<int64_t>() = next_token;
  }

  const VerifyRejectionParams& p_;
  const int64_t* tokens_;  // without the root
  const int64_t drafted_;
  int64_t drawn_ = 0;  // of the drafted ones, those before the first that the draft cannot have drawn
  const Tensor target_logits_, draft_logits_;
  const SampleRequest request_;
  RowSampler<Row> filtered_;
  const Segments segments_;
  Buffer<WeightedRow<Row>> row_;
  Buffer<uint64_t> part_;
  Buffer<double> chance_;
};

}  // namespace

void verify_rejection(const VerifyRejectionParams& p) {
  const int64_t n = p.target_logits.shape[0], vocabulary = p.target_logits.shape[1];
  const int64_t* tokens = p.tokens.as<const int64_t>();
  int64_t drafted = 0;
  while (drafted + 1 < n && tokens[drafted + 1] >= 0 && tokens[drafted + 1] < vocabulary) ++drafted;
  with_row_type(p.target_logits.dtype, p.has_allowed, [&](auto row) { Rejection<decltype(row)>(p, drafted).run(); });
}

}  // namespace specbranch::cpu::SPECBRANCH_ISA

// draft_sample in two launches: the largest logits of the rows' segments (row_max.h), and one pass over the rows that
// finds the k best candidates together with the sums that confidence and entropy need (row_sampler.h).
//
// Weights and weights times distance are summed as integers, so results do not depend on the order of blocks; only the
// entropy may differ from the CPU kernel's, in its last bits.
//
// A row with NaN, +inf, only -inf or an overflow cannot raise here: its tokens are -1, its scores -inf, its confidence
// 0 and its entropy NaN. Nor can filters in memory that are out of range: the rows that they are for are such rows.
#include "sampling/draft_sample.h"

#include "sampling/cuda/launch.h"
#include "sampling/cuda/row_sampler.h"

namespace specbranch::cuda {
namespace {

struct DraftArguments {
  int k;
  Word64* published;  // [rows, segments, BestMany::published_by(k)]
  int64_t* tokens;
  float* scores;
  float* confidence;
  float* entropy;
};

template <typename Row, bool filters_in_memory>
__global__ void __launch_bounds__(sampler_threads)
    draft_sample_kernel(const SampleArguments arguments, const DraftArguments out) {
  using Sampler = RowSampler<Row, BestMany, /*statistics=*/true>;
  static_assert(sizeof(typename Sampler::Shared) <= 48 * 1024, "what every device gives without being asked");
  typename Sampler::Shared& shared = *shared_memory<typename Sampler::Shared>();
  const int64_t row = blockIdx.x / static_cast<unsigned>(arguments.segments);
  Word64* published = out.published + row * arguments.segments * BestMany::published_by(out.k);
  const RowFilters& filters = row_filters<filters_in_memory>(arguments, shared.filters);
  Sampler sampler(arguments, filters, shared, BestMany(shared.best, out.k, published), out.k);
  if (!sampler.run()) return;
  __syncthreads();

  int count = 0;
  const double mass = static_cast<double>(sampler.kept()) * two_to_minus_40;
  if (sampler.is_usable()) {
    if (sampler.best().count() > BestMany::max_k) sampler.best().prune(shared.select);
    count = sampler.best().count();
  }
  if (threadIdx.x == 0) {
    const double distance = static_cast<double>(sampler.kept_distance()) * two_to_minus_40;
    out.entropy[row] =
        sampler.is_usable() ? static_cast<float>(log(mass) + distance / mass) : __uint_as_float(0x7FC00000u);
  }
  // Few enough to sort by counting.
  const int64_t first = row * out.k;
  const Word64* keys = sampler.best().keys();
  for (int i = static_cast<int>(threadIdx.x); i < max(count, out.k); i += sampler_threads) {
    if (i >= count) {
      out.tokens[first + i] = -1;
      out.scores[first + i] = -infinity;
      out.confidence[first + i] = 0.0f;
      continue;
    }
    const Word64 key = keys[i];
    int rank = 0;
    for (int j = 0; j < count; ++j) rank += keys[j] > key ? 1 : 0;
    if (rank >= out.k) continue;
    const int32_t token = key_token(key);
    const float weight = exp_nonpositive(sampler.z(token) - sampler.z_max());
    out.tokens[first + rank] = token;
    out.scores[first + rank] = key_score(key);
    out.confidence[first + rank] = static_cast<float>(static_cast<double>(weight) / mass);
  }
}

template <typename Row>
void run(const DraftSampleParams& p) {
  const int64_t rows = p.draft_logits.shape[0], vocabulary = p.draft_logits.shape[1], k = p.tokens.shape[1];
  const FiltersInMemory& in_memory = p.filters_in_memory;
  const bool any_filters = in_memory.first != nullptr;
  const SampleWorkspace workspace(p.launch.workspace, rows, vocabulary, k, p.filters, any_filters);
  const AllowedRows allowed(p.allowed);
  launch_row_max<Row>("draft_sample", p.launch, rows,
                      row_max_arguments(p.draft_logits, allowed, p.filters, in_memory, workspace));
  const SampleArguments arguments =
      sample_arguments(p.draft_logits, allowed, p.positions, p.seed, p.filters, in_memory, workspace);
  const DraftArguments out{static_cast<int>(k),  workspace.candidates,     p.tokens.as<int64_t>(),
                           p.scores.as<float>(), p.confidence.as<float>(), p.entropy.as<float>()};
  const auto kernel = any_filters ? draft_sample_kernel<Row, true> : draft_sample_kernel<Row, false>;
  launch("draft_sample", kernel, p.launch, dim3(static_cast<unsigned>(rows * arguments.segments)),
         dim3(sampler_threads), sizeof(SamplerShared<BestMany>), arguments, out);
}

}  // namespace

int64_t draft_sample_workspace(int64_t rows, int64_t vocabulary, int64_t k, const Filters& filters, bool any_filters) {
  return SampleWorkspace(nullptr, rows, vocabulary, k < 1 ? 1 : k, filters, any_filters).bytes;
}

void draft_sample(const DraftSampleParams& p) {
  if (p.tokens.shape[1] > BestMany::max_k) {
    fail("k: expected at most " + std::to_string(BestMany::max_k) + " on a CUDA device, got " +
         std::to_string(p.tokens.shape[1]));
  }
  with_row_type(p.draft_logits.dtype, p.has_allowed, [&](auto type) { run<typename decltype(type)::Row>(p); });
}

}  // namespace specbranch::cuda

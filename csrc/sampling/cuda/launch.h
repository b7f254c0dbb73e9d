// The host's side of row_max.h and row_sampler.h: the workspace and the arguments of both launches.
#pragma once

#include "core/workspace.h"
#include "sampling/cuda/row_max.h"
#include "sampling/cuda/row_sampler.h"

namespace specbranch::cuda {

struct SampleWorkspace : Workspace<256> {
  Word64* maxima = nullptr;
  float* masses = nullptr;
  RowState* state = nullptr;
  float* list_z = nullptr;
  Word64* list_key = nullptr;
  Word64* candidates = nullptr;  // [rows, segments, BestMany::published_by(k)]
  int32_t list_capacity = 0;

  // many_k: of BestMany, or 0. any_filters: has all that any filters need.
  SampleWorkspace(void* memory, int64_t rows, int64_t vocabulary, int64_t many_k, const Filters& filters,
                  bool any_filters);

  // Segments of the second launch: one block for each multiprocessor of an H100.
  static Segments segments(int64_t rows, int64_t vocabulary) {
    const int64_t wanted_blocks = rows <= 66 ? 132 : 4 * 132;
    return Segments(rows, vocabulary, wanted_blocks, /*min_tokens=*/sampler_threads * group_tokens, 132);
  }
};

inline SampleWorkspace::SampleWorkspace(void* memory, int64_t rows, int64_t vocabulary, int64_t many_k,
                                        const Filters& filters, bool any_filters)
    : Workspace(memory) {
  if (rows < 1 || vocabulary < 1) return;  // refused later
  maxima = take<Word64>(rows * Segments::for_max(rows, vocabulary).count);
  if (any_filters || filters.searches_mass()) {
    masses = take<float>(rows * Segments::for_max(rows, vocabulary).count);
  }
  if (!any_filters && filters.greedy() && many_k == 0) return;
  state = take<RowState>(rows);
  candidates = take<Word64>(
      many_k == 0 ? 0 : rows * segments(rows, vocabulary).count * BestMany::published_by(static_cast<int>(many_k)));
  if (!any_filters && !filters.searches_count(vocabulary) && !filters.searches_mass()) return;
  const int64_t capacity = rows <= 128 ? 16384 : rows <= 1024 ? 8192 : min_sampled_vocabulary;
  list_capacity = static_cast<int32_t>(vocabulary < capacity ? vocabulary : capacity);
  list_key = take<Word64>(rows * list_capacity);
  list_z = take<float>(rows * list_capacity);
}

// Calls body(RowType<Row>{}) with the LogitRow of this dtype.
template <typename T>
struct RowType {
  using Row = T;
};
template <typename Body>
void with_row_type(Dtype dtype, bool masked, Body body) {
  const auto of = [&](auto element) {
    using T = decltype(element);
    masked ? body(RowType<LogitRow<T, true>>()) : body(RowType<LogitRow<T, false>>());
  };
  switch (dtype) {
    case Dtype::bfloat16: return of(Bfloat16{});
    case Dtype::float16: return of(Float16{});
    default: return of(float{});
  }
}

inline RowMaxArguments row_max_arguments(const Tensor& logits, const AllowedRows& allowed, const Filters& f,
                                         const FiltersInMemory& in_memory, const SampleWorkspace& workspace) {
  const Segments segments = Segments::for_max(logits.shape[0], logits.shape[1]);
  RowMaxArguments a{};
  a.logits = logits.data;
  a.stride = logits.stride[0];
  a.allowed = allowed;
  a.vocabulary = static_cast<int32_t>(logits.shape[1]);
  a.segments = segments.count;
  a.segment_groups = segments.groups;
  a.mass_scale = mass_scale_of(f);
  a.filters = in_memory;
  a.maxima = workspace.maxima;
  a.masses = workspace.masses;
  a.state = workspace.state;
  return a;
}

template <typename Row>
void launch_row_max(const char* name, const Launch& on, int64_t rows, const RowMaxArguments& arguments) {
  launch(name, row_max_kernel<Row>, on, dim3(static_cast<unsigned>(rows * arguments.segments)), dim3(row_max_threads),
         sizeof(RowMaxShared), arguments);
}

inline SampleArguments sample_arguments(const Tensor& logits, const AllowedRows& allowed, const Tensor& positions,
                                        const Tensor& seed, const Filters& f, const FiltersInMemory& in_memory,
                                        const SampleWorkspace& workspace) {
  const int64_t rows = logits.shape[0], vocabulary = logits.shape[1];
  const Segments segments = SampleWorkspace::segments(rows, vocabulary);
  SampleArguments a{};
  a.logits = logits.data;
  a.stride = logits.stride[0];
  a.allowed = allowed;
  a.positions = positions.as<const int64_t>();
  a.seed = seed.as<const int64_t>();
  a.seed_by_row = seed.dims == 1;
  a.vocabulary = static_cast<int32_t>(vocabulary);
  a.max_segments = Segments::for_max(rows, vocabulary).count;
  a.segments = segments.count;
  a.segment_groups = segments.groups;
  a.list_capacity = workspace.list_capacity;
  a.filters = RowFilters(f, vocabulary, a.max_segments, a.list_capacity);
  a.filters_in_memory = in_memory;
  a.maxima = workspace.maxima;
  a.masses = workspace.masses;
  a.state = workspace.state;
  a.list_z = workspace.list_z;
  a.list_key = workspace.list_key;
  return a;
}

}  // namespace specbranch::cuda

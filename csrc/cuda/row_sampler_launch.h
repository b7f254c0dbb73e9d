// The host's side of row_max.h and row_sampler.h: the workspace and the arguments of both launches.
#pragma once

#include <cmath>

#include "cuda/row_max.h"
#include "cuda/row_sampler.h"

namespace specbranch::cuda {

// A workspace is cut into parts one after another; with memory = nullptr only its size counts.
struct Workspace {
  int64_t bytes = 0;

 protected:
  template <typename V>
  V* take(void* memory, int64_t count) {
    V* part = reinterpret_cast<V*>(reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes));
    bytes += divide_up(count * static_cast<int64_t>(sizeof(V)), 256) * 256;
    return part;
  }
};

struct SampleWorkspace : Workspace {
  Word64* maxima = nullptr;
  float* masses = nullptr;
  RowState* state = nullptr;
  float* list_z = nullptr;
  Word64* list_key = nullptr;
  Word64* candidates = nullptr;  // [rows, pieces, BestMany::published_by(k)]
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
};

inline SampleWorkspace::SampleWorkspace(void* memory, int64_t rows, int64_t vocabulary, int64_t many_k,
                                        const Filters& filters) {
  if (rows < 1 || vocabulary < 1) return;  // refused later
  maxima = take<Word64>(memory, rows * Pieces::for_max(rows, vocabulary).count);
  if (searches_mass(filters)) masses = take<float>(memory, rows * Pieces::for_max(rows, vocabulary).count);
  if (filters.greedy() && many_k == 0) return;
  state = take<RowState>(memory, rows);
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

inline RowMaxArguments row_max_arguments(const Tensor& logits, const Filters& f, const SampleWorkspace& workspace) {
  const Pieces pieces = Pieces::for_max(logits.shape[0], logits.shape[1]);
  return {logits.data,   logits.stride[0], static_cast<int32_t>(logits.shape[1]), pieces.count,
          pieces.groups, mass_scale(f),    workspace.maxima,                      workspace.masses,
          workspace.state};
}

template <typename T>
void launch_row_max(const char* name, const Launch& on, int64_t rows, const RowMaxArguments& arguments) {
  launch(name, row_max_kernel<T>, on, dim3(static_cast<unsigned>(rows * arguments.pieces)), dim3(row_max_threads),
         sizeof(RowMaxShared), arguments);
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

// Copies the rows of one head to a staging area and from there to their places, so that overlaps are safe.
#include "cache/kv_commit.h"

#include <algorithm>
#include <cstring>

#include "core/cpu/memory.h"
#include "core/cpu/threads.h"

namespace specbranch::cpu::SPECBRANCH_ISA {
namespace {

constexpr int64_t min_parallel_bytes = 1 << 19;  // below it, waking threads costs more than the copy

// The rows of a path that are not in place yet.
struct Moves {
  int64_t count = 0;
  Buffer<int64_t> from, to;

  explicit Moves(const KvCommitParams& p) : from(p.rows.shape[0]), to(p.rows.shape[0]) {
    const int64_t *rows = p.rows.as<const int64_t>(), *start = p.start.as<const int64_t>();
    for (int64_t i = 0; i < p.rows.shape[0]; ++i) {
      const int64_t place = p.start.dims == 1 ? start[i] : *start + i;
      if (rows[i] == place) continue;
      from[count] = rows[i];
      to[count++] = place;
    }
  }
};

void move_head(char* head, int64_t row_stride, int64_t row_bytes, Moves& moves, char* staging) {
  for (int64_t i = 0; i < moves.count; ++i) {
    std::memcpy(staging + i * row_bytes, head + moves.from[i] * row_stride, row_bytes);
  }
  for (int64_t i = 0; i < moves.count; ++i) {
    std::memcpy(head + moves.to[i] * row_stride, staging + i * row_bytes, row_bytes);
  }
}

}  // namespace

void kv_commit(const KvCommitParams& p) {
  Moves moves(p);
  const int64_t m = moves.count;
  if (m == 0) return;

  int64_t largest_row = 0, bytes = 0;
  for (int64_t b = 0; b < p.buffer_count; ++b) {
    const Tensor& buffer = p.buffers[b];
    largest_row = std::max(largest_row, buffer.shape[2] * buffer.item_bytes);
    bytes += buffer.shape[0] * m * buffer.shape[2] * buffer.item_bytes;
  }
  if (bytes == 0) return;
  // All threads or one: another team size would make OpenMP end threads and start them again for the next op.
  const int threads = bytes < min_parallel_bytes ? 1 : std::max(p.launch.threads, 1);
  Buffer<char> staging(threads * m * largest_row);

#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < p.buffer_count; ++b) {
    const Tensor& buffer = p.buffers[b];
    if (buffer.shape[2] == 0) continue;  // it may have no memory
    const int64_t item = buffer.item_bytes;
    for (int64_t head = 0; head < buffer.shape[0]; ++head) {
      move_head(buffer.as<char>() + head * buffer.stride[0] * item, buffer.stride[1] * item, buffer.shape[2] * item,
                moves, staging.at(thread_index() * m * largest_row));
    }
  }
}

}  // namespace specbranch::cpu::SPECBRANCH_ISA

// kv_commit's checks and the choice of its kernel.
#include "cache/kv_commit.h"

#include <algorithm>

#include "core/dispatch.h"

namespace specbranch {

void check_kv_commit(const KvCommitParams& p) {
  check_shape(p.rows, {-1}, "[m]");
  check_dtype(p.rows, Dtype::int64);
  check_contiguous(p.rows);
  if (p.start.dims != 0) fail("start: expected shape [], got " + shape_text(p.start));
  check_dtype(p.start, Dtype::int64);

  const auto buffer_name = [](int64_t b) { return "buffers[" + std::to_string(b) + "]"; };
  for (int64_t b = 0; b < p.buffer_count; ++b) {
    const Tensor& buffer = p.buffers[b];
    const std::string name = buffer_name(b);
    if (buffer.dims != 3) fail(name + ": expected shape [Hkv, C, D], got " + shape_text(buffer));
    check_last_dim_contiguous(buffer, name);
    // Two of its rows would be one, and the last one written would win.
    for (int i = 0; i < 2; ++i) {
      if (buffer.shape[i] > 1 && buffer.stride[i] == 0 && !is_empty(buffer)) {
        fail(name + ": expected rows in memory of their own, got stride 0 in dimension " + std::to_string(i));
      }
    }
  }
  if (p.launch.on_cuda()) return;  // the kernel moves no row that is out of range

  const int64_t m = p.rows.shape[0], start = *p.start.as<const int64_t>();
  const int64_t* rows = p.rows.as<const int64_t>();
  if (start < 0) fail("start: expected at least 0, got " + std::to_string(start));
  int64_t lowest = 0, highest = -1;
  for (int64_t i = 0; i < m; ++i) {
    lowest = std::min(lowest, rows[i]);
    highest = std::max(highest, rows[i]);
  }
  for (int64_t b = 0; b < p.buffer_count; ++b) {
    const std::string name = buffer_name(b);
    const int64_t capacity = p.buffers[b].shape[1];
    if (lowest < 0 || highest >= capacity) {
      fail("rows: expected rows of " + name + ", 0 to " + std::to_string(capacity - 1) + ", got " +
           std::to_string(lowest < 0 ? lowest : highest));
    }
    if (start > capacity - m) {
      fail("start: expected start + m to fit the " + std::to_string(capacity) + " rows of " + name + ", got " +
           std::to_string(start) + " + " + std::to_string(m));
    }
  }
}

SPECBRANCH_DISPATCH(kv_commit, KvCommitParams)

}  // namespace specbranch

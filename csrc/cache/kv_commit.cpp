// kv_commit's checks and the choice of its kernel.
#include "cache/kv_commit.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "core/dispatch.h"

namespace specbranch {
namespace {

void check_no_place_twice(const int64_t* places, int64_t m) {
  if (std::adjacent_find(places, places + m, std::greater_equal<>()) == places + m) return;  // as they mostly are
  std::vector<int64_t> sorted(places, places + m);
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) {
    fail("start: expected another place for each row, got " + std::to_string(*twice) + " twice");
  }
}

}  // namespace

void check_kv_commit(const KvCommitParams& p) {
  check_shape(p.rows, {-1}, "[m]");
  check_dtype(p.rows, Dtype::int64);
  check_contiguous(p.rows);
  const int64_t m = p.rows.shape[0];
  const bool each = p.start.dims == 1 && p.start.shape[0] == m;
  if (p.start.dims != 0 && !each) {
    fail("start: expected shape [] or [m] = [" + std::to_string(m) + "], got " + shape_text(p.start));
  }
  check_dtype(p.start, Dtype::int64);
  check_contiguous(p.start);

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

  const int64_t *rows = p.rows.as<const int64_t>(), *start = p.start.as<const int64_t>();
  if (each) {
    check_no_place_twice(start, m);
  } else if (*start < 0) {
    fail("start: expected at least 0, got " + std::to_string(*start));
  }
  for (int64_t b = 0; b < p.buffer_count; ++b) {
    const std::string name = buffer_name(b);
    const int64_t capacity = p.buffers[b].shape[1];
    const auto check_rows_of = [&](const char* what, const int64_t* numbers) {
      for (int64_t i = 0; i < m; ++i) {
        if (numbers[i] >= 0 && numbers[i] < capacity) continue;
        fail(std::string(what) + ": expected rows of " + name + ", 0 to " + std::to_string(capacity - 1) + ", got " +
             std::to_string(numbers[i]));
      }
    };
    check_rows_of("rows", rows);
    if (each) {
      check_rows_of("start", start);
    } else if (*start > capacity - m) {
      fail("start: expected start + m to fit the " + std::to_string(capacity) + " rows of " + name + ", got " +
           std::to_string(*start) + " + " + std::to_string(m));
    }
  }
}

SPECBRANCH_DISPATCH(kv_commit, KvCommitParams)

}  // namespace specbranch

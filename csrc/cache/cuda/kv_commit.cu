// One block moves a column of all m rows of one head of one buffer: rows are read into shared memory, and written
// only when all of them are there, so source and destination may overlap. Columns of a row do not depend on each
// other; they are as wide as shared memory allows. The buffers' addresses travel as kernel arguments: no copy to the
// device comes first, and a captured graph keeps them.
//
// A row outside [0, C) or a place outside it cannot raise here: it is not moved. So a path padded with -1 is moved up
// to its end, and m may stay the same in a captured graph.
#include "cache/kv_commit.h"

#include "core/cuda/device.h"

namespace specbranch::cuda {
namespace {

constexpr int threads = 128;
constexpr int64_t vector_bytes = 16;
constexpr int64_t max_shared_bytes = 48 * 1024;

struct Buffer {
  char* data;
  int64_t head_stride, row_stride;  // bytes
  uint32_t heads, row_bytes, capacity;
};

template <int max_buffers>
struct Buffers {
  Buffer buffer[max_buffers];
};

// T: the widest type that every address and size is a multiple of.
template <typename T, int max_buffers>
__global__ void __launch_bounds__(threads)
    kv_commit_kernel(const __grid_constant__ Buffers<max_buffers> buffers, const int64_t* rows, int m,
                     const int64_t* start_pointer, bool start_of_each, int column_items) {
  const Buffer& buffer = buffers.buffer[blockIdx.z];
  const int row_items = buffer.row_bytes / sizeof(T);
  const int first = blockIdx.x * column_items;
  if (blockIdx.y >= buffer.heads || first >= row_items) return;
  const int items = min(column_items, row_items - first);
  const int64_t start = *start_pointer, capacity = buffer.capacity;
  char* head = buffer.data + blockIdx.y * buffer.head_stride + first * sizeof(T);
  T* staging = shared_memory<T>();

  const auto place = [&](int i) {
    if (start_of_each) return start_pointer[i];
    return start < -i || start >= capacity - i ? int64_t{-1} : start + i;  // it might overflow
  };
  const auto moves = [&](int i, int64_t to) {
    const int64_t from = rows[i];
    return to >= 0 && to < capacity && from != to && from >= 0 && from < capacity;
  };
  for (int at = threadIdx.x; at < m * items; at += threads) {
    const int i = at / items;
    if (!moves(i, place(i))) continue;
    staging[at] = reinterpret_cast<const T*>(head + rows[i] * buffer.row_stride)[at - i * items];
  }
  __syncthreads();
  for (int at = threadIdx.x; at < m * items; at += threads) {
    const int i = at / items;
    const int64_t to = place(i);
    if (!moves(i, to)) continue;
    reinterpret_cast<T*>(head + to * buffer.row_stride)[at - i * items] = staging[at];
  }
}

template <typename T, int max_buffers>
void move(const KvCommitParams& p, int64_t first, int64_t count) {
  Buffers<max_buffers> buffers;
  uint32_t heads = 0;
  int64_t largest_row = 0;
  for (int64_t b = 0; b < count; ++b) {
    const Tensor& t = p.buffers[first + b];
    const int64_t row_bytes = t.shape[2] * t.item_bytes;
    if (t.shape[0] > 65535 || t.shape[1] > INT32_MAX || row_bytes > INT32_MAX) {
      fail("buffers[" + std::to_string(first + b) + "]: expected at most 65535 heads and 2^31 - 1 rows, got " +
           shape_text(t));
    }
    buffers.buffer[b] = {t.as<char>(),
                         t.stride[0] * t.item_bytes,
                         t.stride[1] * t.item_bytes,
                         static_cast<uint32_t>(t.shape[0]),
                         static_cast<uint32_t>(row_bytes),
                         static_cast<uint32_t>(t.shape[1])};
    heads = std::max(heads, static_cast<uint32_t>(t.shape[0]));
    largest_row = std::max(largest_row, row_bytes);
  }
  const int64_t m = p.rows.shape[0], item = sizeof(T);
  const int64_t row_items = largest_row / item;
  if (heads == 0 || row_items == 0) return;
  const int64_t column_items = std::min(row_items, max_shared_bytes / (m * item));
  if (column_items == 0) {
    fail("rows: expected at most " + std::to_string(max_shared_bytes / item) + " rows, got " + std::to_string(m));
  }
  launch("kv_commit", kv_commit_kernel<T, max_buffers>, p.launch,
         dim3(static_cast<unsigned>(divide_up(row_items, column_items)), heads, static_cast<unsigned>(count)),
         dim3(threads), static_cast<size_t>(m * column_items * item), buffers, p.rows.as<const int64_t>(),
         static_cast<int>(m), p.start.as<const int64_t>(), p.start.dims == 1, static_cast<int>(column_items));
}

template <typename T>
void move_all(const KvCommitParams& p) {
  constexpr int few = 96, many = 640;  // few: 48 layers in the 4 KiB of arguments that cost least
  if (p.buffer_count <= few) return move<T, few>(p, 0, p.buffer_count);
  for (int64_t first = 0; first < p.buffer_count; first += many) {
    move<T, many>(p, first, std::min<int64_t>(many, p.buffer_count - first));
  }
}

}  // namespace

void kv_commit(const KvCommitParams& p) {
  if (p.rows.shape[0] == 0 || p.buffer_count == 0) return;
  // Bits of every address, stride and size that a vector must divide.
  uint64_t bits = 0;
  for (int64_t b = 0; b < p.buffer_count; ++b) {
    const Tensor& t = p.buffers[b];
    bits |= reinterpret_cast<uint64_t>(t.data) | static_cast<uint64_t>(t.shape[2] * t.item_bytes);
    if (t.shape[0] > 1) bits |= static_cast<uint64_t>(t.stride[0] * t.item_bytes);
    if (t.shape[1] > 1) bits |= static_cast<uint64_t>(t.stride[1] * t.item_bytes);
  }
  if (bits % vector_bytes == 0) return move_all<uint4>(p);
  move_all<uint8_t>(p);
}

}  // namespace specbranch::cuda

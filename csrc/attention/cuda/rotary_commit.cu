// A group of threads embeds or copies one head of one row, a row's query heads first, then its key heads and its value
// heads. A thread takes two vectors whose elements are pairs of the rotation, or one that passes through. Without a norm
// no thread needs another. With one the group is a warp, whose lanes first sum the squares of every 32nd element:
// reference and CPU kernel have the same sums.
//
// The places are read from device memory, so that a captured graph writes where the rows say when it runs. A row outside
// [0, C) cannot raise here: its keys and values are not written.
#include "attention/rotary_commit.h"

#include <algorithm>
#include <type_traits>

#include "core/cuda/device.h"

namespace specbranch::cuda {
namespace {

static_assert(head_partial_sums == warp_size, "a lane has one of the sums");

constexpr int threads = 128;
constexpr int vector_bytes = 16;

// Strides count elements.
template <typename T, typename Table>
struct Arguments {
  const T *query, *key, *value;
  const Table *cos, *sin;
  const int64_t* rows;
  T *keys, *values, *output;
  const T *query_norm, *key_norm;  // null: none
  int64_t query_row, query_head, key_row, key_head, value_row, value_head, cos_row, sin_row;
  int64_t keys_head, keys_row, values_head, values_row, capacity;
  int query_heads, kv_heads, dim, value_dim, rotary_dim, lanes;  // lanes: of a group, a power of two up to a warp's
  float eps;
  bool unit_offset, round_first, interleaved;
};

// `width` elements are a vector, or one element.
template <int width, typename T>
__device__ void copy(T* to, const T* from) {
  if constexpr (width * sizeof(T) % vector_bytes == 0) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  } else {
    static_assert(width == 1, "vectors have 16 bytes");
    *to = *from;
  }
}

template <int width, typename T>
__device__ void load(const T* from, float* x) {
  constexpr int part = width == 1 ? 1 : vector_bytes / sizeof(T);
  __align__(vector_bytes) T items[width];
#pragma unroll
  for (int i = 0; i < width; i += part) copy<part>(items + i, from + i);
#pragma unroll
  for (int i = 0; i < width; ++i) x[i] = to_float(items[i]);
}

template <int width, typename T>
__device__ void store(T* to, const float* x) {
  __align__(vector_bytes) T items[width];
#pragma unroll
  for (int i = 0; i < width; ++i) items[i] = from_float<T>(x[i]);
  copy<width>(to, items);
}

template <typename T>
__device__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

// What torch rounds between its operations: to the tensors' type, and not at all where a table of float32 makes it go on
// in float32.
template <typename T, typename Table>
__device__ float step(float x) {
  if constexpr (std::is_same_v<T, Table>) return rounded<T>(x);
  return x;
}

template <typename T, typename Table>
__device__ void rotate(float& first, float& second, float cos_first, float sin_first, float cos_second,
                       float sin_second) {
  const float a = first, b = second;
  first = step<T, Table>(a * cos_first) - step<T, Table>(b * sin_first);
  second = step<T, Table>(b * cos_second) + step<T, Table>(a * sin_second);
}

// The norm of a head: what its elements are multiplied by.
template <typename T>
struct Norm {
  const T* weight;  // null: none
  float factor;
  bool unit_offset, round_first;

  template <int width>
  __device__ void apply(float* x, int at) const {
    if (weight == nullptr) return;
    float w[width];
    load<width>(weight + at, w);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float scaled = x[i] * factor;
      x[i] = rounded<T>((unit_offset ? w[i] + 1.0f : w[i]) * (round_first ? rounded<T>(scaled) : scaled));
    }
  }
};

template <typename T>
__device__ float norm_factor(const T* x, int dim, float eps) {
  float sum = 0.0f;
  for (int i = threadIdx.x % warp_size; i < dim; i += warp_size) {
    const float element = to_float(x[i]);
    sum += element * element;
  }
#pragma unroll
  for (int half = warp_size / 2; half > 0; half /= 2) sum += __shfl_xor_sync(all_lanes, sum, half);
  return 1.0f / sqrtf(sum / static_cast<float>(dim) + eps);
}

template <int width, typename T, typename Table>
__device__ void embed(const Arguments<T, Table>& a, const T* from, const T* weight, const Table* cos, const Table* sin,
                      int lane, T* to) {
  Norm<T> norm{weight, 1.0f, a.unit_offset, a.round_first};
  if (weight != nullptr) norm.factor = norm_factor(from, a.dim, a.eps);

  for (int unit = lane; unit < a.rotary_dim / (2 * width); unit += a.lanes) {
    const int first = a.interleaved ? 2 * unit * width : unit * width;
    const int second = first + (a.interleaved ? width : a.rotary_dim / 2);
    float x[2 * width], c[2 * width], s[2 * width];
    load<width>(from + first, x);
    load<width>(from + second, x + width);
    load<width>(cos + first, c);
    load<width>(cos + second, c + width);
    load<width>(sin + first, s);
    load<width>(sin + second, s + width);
    norm.template apply<width>(x, first);
    norm.template apply<width>(x + width, second);
    if (a.interleaved) {
#pragma unroll
      for (int i = 0; i < 2 * width; i += 2) rotate<T, Table>(x[i], x[i + 1], c[i], s[i], c[i + 1], s[i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        rotate<T, Table>(x[i], x[width + i], c[i], s[i], c[width + i], s[width + i]);
      }
    }
    store<width>(to + first, x);
    store<width>(to + second, x + width);
  }

  for (int at = a.rotary_dim + lane * width; at < a.dim; at += a.lanes * width) {
    if (weight == nullptr) {
      copy<width>(to + at, from + at);
      continue;
    }
    float x[width];
    load<width>(from + at, x);
    norm.template apply<width>(x, at);
    store<width>(to + at, x);
  }
}

template <typename T, typename Table, int width>
__global__ void __launch_bounds__(threads) rotary_commit_kernel(const __grid_constant__ Arguments<T, Table> a) {
  const int thread = blockIdx.y * threads + threadIdx.x;
  const int lane = thread % a.lanes, group = thread / a.lanes;
  const int key_head = group - a.query_heads, value_head = key_head - a.kv_heads;
  const int64_t row = blockIdx.x;
  const Table *cos = a.cos + row * a.cos_row, *sin = a.sin + row * a.sin_row;
  const T *from = nullptr, *norm = nullptr;
  T* to = nullptr;
  if (value_head >= a.kv_heads) return;
  if (key_head < 0) {
    from = a.query + row * a.query_row + group * a.query_head;
    to = a.output + (row * a.query_heads + group) * a.dim;
    norm = a.query_norm;
  } else {
    const int64_t place = a.rows[row];
    if (place < 0 || place >= a.capacity) return;
    if (value_head >= 0) {
      from = a.value + row * a.value_row + value_head * a.value_head;
      to = a.values + value_head * a.values_head + place * a.values_row;
      for (int at = lane * width; at < a.value_dim; at += a.lanes * width) copy<width>(to + at, from + at);
      return;
    }
    from = a.key + row * a.key_row + key_head * a.key_head;
    to = a.keys + key_head * a.keys_head + place * a.keys_row;
    norm = a.key_norm;
  }
  embed<width>(a, from, norm, cos, sin, lane, to);
}

// Whether every address and stride, and with them every place that a vector may have in a head, is a multiple of 16 bytes.
bool vectors_fit(const RotaryCommitParams& p) {
  uint64_t bits = static_cast<uint64_t>(p.cos.shape[1] / 2 * p.query.item_bytes);
  const auto add = [&bits](const Tensor& t) {
    const int last = t.dims - 1;
    bits |= reinterpret_cast<uint64_t>(t.data);
    for (int i = 0; i < last; ++i) {
      if (t.shape[i] > 1) bits |= static_cast<uint64_t>(t.stride[i] * t.item_bytes);
    }
  };
  for (const Tensor* t : {&p.query, &p.key, &p.value, &p.keys, &p.values, &p.output}) {
    add(*t);
    bits |= static_cast<uint64_t>(t->shape[2] * t->item_bytes);
  }
  for (const Tensor* t : {&p.cos, &p.sin}) add(*t);
  if (p.normed) bits |= reinterpret_cast<uint64_t>(p.query_norm.data) | reinterpret_cast<uint64_t>(p.key_norm.data);
  return bits % vector_bytes == 0;
}

template <typename T, typename Table, int width>
void commit(const RotaryCommitParams& p) {
  const int64_t query_heads = p.query.shape[1], kv_heads = p.key.shape[1];
  const int64_t dim = p.query.shape[2], value_dim = p.value.shape[2], rotary_dim = p.cos.shape[1];
  const int64_t units = std::max({rotary_dim / 2, dim - rotary_dim, kv_heads > 0 ? value_dim : 0}) / width;
  int64_t lanes = p.normed ? warp_size : 1;
  while (lanes < units && lanes < warp_size) lanes *= 2;
  const int64_t blocks = divide_up((query_heads + 2 * kv_heads) * lanes, threads);
  if (blocks == 0) return;
  if (blocks > 65535 || dim > INT32_MAX / 2 || value_dim > INT32_MAX / 2) {
    fail("query: expected at most 200000 heads and 2^30 elements per head, got " + shape_text(p.query));
  }
  Arguments<T, Table> a{};
  a.query = p.query.as<const T>();
  a.key = p.key.as<const T>();
  a.value = p.value.as<const T>();
  a.cos = p.cos.as<const Table>();
  a.sin = p.sin.as<const Table>();
  a.rows = p.rows.as<const int64_t>();
  a.keys = p.keys.as<T>();
  a.values = p.values.as<T>();
  a.output = p.output.as<T>();
  if (p.normed) {
    a.query_norm = p.query_norm.as<const T>();
    a.key_norm = p.key_norm.as<const T>();
  }
  a.query_row = p.query.stride[0];
  a.query_head = p.query.stride[1];
  a.key_row = p.key.stride[0];
  a.key_head = p.key.stride[1];
  a.value_row = p.value.stride[0];
  a.value_head = p.value.stride[1];
  a.cos_row = p.cos.stride[0];
  a.sin_row = p.sin.stride[0];
  a.keys_head = p.keys.stride[0];
  a.keys_row = p.keys.stride[1];
  a.values_head = p.values.stride[0];
  a.values_row = p.values.stride[1];
  a.capacity = p.keys.shape[1];
  a.query_heads = static_cast<int>(query_heads);
  a.kv_heads = static_cast<int>(kv_heads);
  a.dim = static_cast<int>(dim);
  a.value_dim = static_cast<int>(value_dim);
  a.rotary_dim = static_cast<int>(rotary_dim);
  a.lanes = static_cast<int>(lanes);
  a.eps = static_cast<float>(p.eps);
  a.unit_offset = p.unit_offset;
  a.round_first = p.round_first;
  a.interleaved = p.interleaved;
  launch("rotary_commit", rotary_commit_kernel<T, Table, width>, p.launch,
         dim3(static_cast<unsigned>(p.query.shape[0]), static_cast<unsigned>(blocks)), dim3(threads), 0, a);
}

template <typename T, typename Table>
void commit_in_vectors(const RotaryCommitParams& p) {
  if (vectors_fit(p)) return commit<T, Table, vector_bytes / sizeof(T)>(p);
  commit<T, Table, 1>(p);
}

template <typename T>
void commit_with_tables(const RotaryCommitParams& p) {
  if (p.cos.dtype == Dtype::float32) return commit_in_vectors<T, float>(p);
  commit_in_vectors<T, T>(p);
}

}  // namespace

void rotary_commit(const RotaryCommitParams& p) {
  if (p.query.shape[0] == 0) return;
  switch (p.query.dtype) {
    case Dtype::bfloat16: return commit_with_tables<Bfloat16>(p);
    case Dtype::float16: return commit_with_tables<Float16>(p);
    default: return commit_in_vectors<float, float>(p);
  }
}

}  // namespace specbranch::cuda

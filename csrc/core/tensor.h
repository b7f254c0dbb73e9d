// A tensor as the kernels see it, and the checks that every op makes on its arguments. No Python, no torch.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace specbranch {

enum class Dtype : int { float32, float64, bfloat16, float16, int64, int32, uint8, other };

inline const char* dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return "float32";
    case Dtype::float64: return "float64";
    case Dtype::bfloat16: return "bfloat16";
    case Dtype::float16: return "float16";
    case Dtype::int64: return "int64";
    case Dtype::int32: return "int32";
    case Dtype::uint8: return "uint8";
    default: return "another dtype";
  }
}

// 0 for a dtype that the kernels do not know.
inline int64_t item_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
    case Dtype::int32: return 4;
    case Dtype::bfloat16:
    case Dtype::float16: return 2;
    case Dtype::float64:
    case Dtype::int64: return 8;
    case Dtype::uint8: return 1;
    default: return 0;
  }
}

constexpr int cpu_device = -1;

// Shapes and strides count elements. `name` is what error messages call it.
struct Tensor {
  static constexpr int max_dims = 4;
  const char* name = "";
  void* data = nullptr;
  int device = cpu_device;  // or the index of a CUDA device
  Dtype dtype = Dtype::other;
  int64_t item_bytes = 0;
  int dims = 0;
  int64_t shape[max_dims] = {};
  int64_t stride[max_dims] = {};

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

constexpr int max_tickets = 256;

// How an op is to run: filled by the binding, first member of every Params struct.
struct Launch {
  int device = cpu_device;
  int threads = 1;              // on the CPU
  void* stream = nullptr;       // on a CUDA device: a cudaStream_t of that device
  void* workspace = nullptr;    // on a CUDA device: at least the bytes that <op>_workspace asks for, 256-byte aligned
  unsigned* tickets = nullptr;  // on a CUDA device: max_tickets counters that are 0, and that a kernel leaves 0

  bool on_cuda() const { return device != cpu_device; }
};

[[noreturn]] inline void fail(const std::string& what) { throw std::invalid_argument(what); }

// The shortest text that tells numbers apart, from 1e-45 to 1e308.
inline std::string number_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", value);
  return text;
}

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int i = 0; i < t.dims; ++i) text += (i ? ", " : "") + std::to_string(t.shape[i]);
  return text + "]";
}

// Extents of -1 match anything; `expected` is the shape in words, for example "[n, V]".
template <int N>
void check_shape(const Tensor& t, const int64_t (&extents)[N], const char* expected) {
  bool same = t.dims == N;
  for (int i = 0; same && i < N; ++i) same = extents[i] < 0 || t.shape[i] == extents[i];
  if (same) return;
  std::string wanted;
  for (int i = 0; i < N; ++i) wanted += (i ? ", " : "") + (extents[i] < 0 ? "*" : std::to_string(extents[i]));
  fail(std::string(t.name) + ": expected shape " + expected + " = [" + wanted + "], got " + shape_text(t));
}

inline void check_dtype(const Tensor& t, Dtype dtype) {
  if (t.dtype != dtype) {
    fail(std::string(t.name) + ": expected " + dtype_name(dtype) + ", got " + dtype_name(t.dtype));
  }
}

inline bool is_float(Dtype dtype) {
  return dtype == Dtype::float32 || dtype == Dtype::bfloat16 || dtype == Dtype::float16;
}

inline void check_float(const Tensor& t) {
  if (!is_float(t.dtype)) {
    fail(std::string(t.name) + ": expected float32, bfloat16 or float16, got " + dtype_name(t.dtype));
  }
}

// Strides of an empty tensor mean nothing.
inline bool is_empty(const Tensor& t) {
  for (int i = 0; i < t.dims; ++i) {
    if (t.shape[i] == 0) return true;
  }
  return false;
}

inline void check_last_dim_contiguous(const Tensor& t, const std::string& name) {
  const int last = t.dims - 1;
  if (t.shape[last] > 1 && t.stride[last] != 1 && !is_empty(t)) {
    fail(name + ": expected stride 1 in the last dimension, got " + std::to_string(t.stride[last]));
  }
}
inline void check_last_dim_contiguous(const Tensor& t) { check_last_dim_contiguous(t, t.name); }

// For small integer vectors: every stride 1, so that a plain pointer is enough.
inline void check_contiguous(const Tensor& t) {
  if (is_empty(t)) return;
  int64_t expected = 1;
  for (int i = t.dims - 1; i >= 0; --i) {
    if (t.shape[i] > 1 && t.stride[i] != expected) fail(std::string(t.name) + ": expected a contiguous tensor");
    expected *= t.shape[i];
  }
}

}  // namespace specbranch

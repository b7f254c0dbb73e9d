// Reads a torch.Tensor through its Python attributes, so that the core needs no torch header.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "core/tensor.h"

namespace specbranch {

namespace py = pybind11;

// The torch.dtype objects that the kernels know; torch keeps exactly one object of each.
struct TorchDtypes {
  py::object float32, float64, bfloat16, float16, int64, int32, uint8;

  static const TorchDtypes& get() {
    // Never destroyed: Python may be gone by the time static destructors run.
    static const TorchDtypes* dtypes = [] {
      const py::module_ torch = py::module_::import("torch");
      return new TorchDtypes{torch.attr("float32"), torch.attr("float64"), torch.attr("bfloat16"),
                             torch.attr("float16"), torch.attr("int64"),   torch.attr("int32"),
                             torch.attr("uint8")};
    }();
    return *dtypes;
  }

  Dtype code(const py::object& dtype) const {
    if (dtype.is(float32)) return Dtype::float32;
    if (dtype.is(float64)) return Dtype::float64;
    if (dtype.is(bfloat16)) return Dtype::bfloat16;
    if (dtype.is(float16)) return Dtype::float16;
    if (dtype.is(int64)) return Dtype::int64;
    if (dtype.is(int32)) return Dtype::int32;
    if (dtype.is(uint8)) return Dtype::uint8;
    return Dtype::other;
  }
};

// Names are interned once: attribute look-ups are most of the cost of a small call.
#define SPECBRANCH_INTERNED(variable, text) static PyObject* const variable = PyUnicode_InternFromString(text)

inline int64_t as_int64(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline Tensor tensor(const py::handle object, const char* name) {
  SPECBRANCH_INTERNED(data_ptr, "data_ptr");
  SPECBRANCH_INTERNED(dtype, "dtype");
  SPECBRANCH_INTERNED(shape, "shape");
  SPECBRANCH_INTERNED(stride, "stride");
  SPECBRANCH_INTERNED(is_cpu, "is_cpu");
  SPECBRANCH_INTERNED(is_cuda, "is_cuda");
  SPECBRANCH_INTERNED(get_device, "get_device");
  SPECBRANCH_INTERNED(itemsize, "itemsize");
  auto get = [&](PyObject* attribute) {
    PyObject* value = PyObject_GetAttr(object.ptr(), attribute);
    if (value == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
  };
  auto call = [&](PyObject* method) {
    PyObject* value = PyObject_CallMethodNoArgs(object.ptr(), method);
    if (value == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
  };

  Tensor t;
  t.name = name;
  if (get(is_cpu).ptr() != Py_True) {
    if (get(is_cuda).ptr() != Py_True) fail(std::string(name) + ": expected a tensor on the CPU or a CUDA device");
    t.device = static_cast<int>(as_int64(call(get_device).ptr()));
  }
  t.dtype = TorchDtypes::get().code(get(dtype));
  t.item_bytes = item_bytes(t.dtype) > 0 ? item_bytes(t.dtype) : as_int64(get(itemsize).ptr());
  const py::object extents = get(shape), steps = call(stride);
  t.dims = static_cast<int>(PyTuple_GET_SIZE(extents.ptr()));
  if (t.dims > Tensor::max_dims) {
    fail(std::string(name) + ": expected at most 4 dimensions, got " + std::to_string(t.dims));
  }
  for (int i = 0; i < t.dims; ++i) {
    t.shape[i] = as_int64(PyTuple_GET_ITEM(extents.ptr(), i));
    t.stride[i] = as_int64(PyTuple_GET_ITEM(steps.ptr(), i));
  }
  t.data = reinterpret_cast<void*>(as_int64(call(data_ptr).ptr()));
  return t;
}

}  // namespace specbranch

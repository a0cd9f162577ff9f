// A frozen network called with a NumPy array: checks it and the `out` that may come with it, before anything is
// written. Called by frozen.cpp with the GIL. NumPy need not be there: nothing here may import it.
#include <ATen/core/Tensor.h>
#include <pybind11/numpy.h>

#include <string>

#include "../tensors/dtypes.h"
#include "frozen_call.h"

namespace fastmlp::frozen {
namespace {

using Array = py::detail::PyArray_Proxy;

const py::detail::npy_api* numpy() {
  static const py::detail::npy_api* api = nullptr;
  if (!api) {
    // Where nobody has imported NumPy no object is of it.
    static PyObject* const name = PyUnicode_InternFromString("numpy");
    PyObject* const module = PyImport_GetModule(name);
    if (!module) {
      if (PyErr_Occurred()) throw py::error_already_set();
      return nullptr;
    }
    Py_DECREF(module);
    api = &py::detail::npy_api::get();
  }
  return api;
}

constexpr int numpy_half = 23;  // NPY_HALF, which pybind11 does not list

int numpy_type(const Call& call) {
  switch (call.dtype()) {
    case at::kFloat:
      return py::detail::npy_api::NPY_FLOAT_;
    case at::kDouble:
      return py::detail::npy_api::NPY_DOUBLE_;
    case at::kHalf:
      return numpy_half;
    default:
      break;
  }
  TORCH_CHECK_TYPE(false,
                   "fastmlp: the frozen network has dtype bfloat16, which NumPy lacks; pass a tensor, or freeze with "
                   "dtype=torch.bfloat16, whose input and output are float32");
}

// That of PyTorch; undefined for what no network computes in.
at::ScalarType scalar_type_of(const py::detail::PyArrayDescr_Proxy& descr) {
  switch (descr.type_num) {
    case py::detail::npy_api::NPY_FLOAT_:
      return at::kFloat;
    case py::detail::npy_api::NPY_DOUBLE_:
      return at::kDouble;
    case numpy_half:
      return at::kHalf;
    default:
      return at::ScalarType::Undefined;
  }
}

const Array& array_of(PyObject* object) { return *reinterpret_cast<const Array*>(object); }

void check_numpy_dtype(const Call& call, const std::string& name, PyObject* object, bool is_out) {
  const auto* descr = reinterpret_cast<const py::detail::PyArrayDescr_Proxy*>(array_of(object).descr);
  const int expected = numpy_type(call);
  if (descr->type_num == expected && (descr->byteorder == '=' || descr->byteorder == '|')) return;
  const auto own = py::str(py::reinterpret_borrow<py::object>(array_of(object).descr)).cast<std::string>();
  const auto wanted = py::str(py::dtype(expected)).cast<std::string>();
  const std::string remedy = is_out ? "; make it with dtype=np." + wanted
                                    : dtype_remedy(call, scalar_type_of(*descr), name + ".astype(np." + wanted + ')');
  TORCH_CHECK(false, "fastmlp: ", name, " has dtype ", own, ", expected ", wanted,
              " in native byte order, the dtype of the frozen network", remedy);
}

View view_of(PyObject* object) {
  const Array& array = array_of(object);
  View view;
  view.data = array.data;
  view.dims = array.nd;
  for (int d = 0; d < array.nd; d++) {
    view.sizes[d] = array.dimensions[d];
    view.steps[d] = array.strides[d];
  }
  return view;
}

}  // namespace

bool is_array(PyObject* object) {
  const py::detail::npy_api* api = numpy();
  return api && Py_TYPE(object) == api->PyArray_Type_;
}

View view_of_array(const Call& call, const std::string& name, PyObject* object) {
  check_numpy_dtype(call, name, object, false);
  check_dimensions(array_of(object).nd);
  return view_of(object);
}

py::object new_array(const Call& call, const View& result) {
  using py::detail::npy_api;
  const npy_api& api = *numpy();
  Py_intptr_t sizes[View::most_dimensions];
  std::copy_n(result.sizes, result.dims, sizes);
  auto made = py::reinterpret_steal<py::object>(
      api.PyArray_NewFromDescr_(api.PyArray_Type_, api.PyArray_DescrFromType_(numpy_type(call)), result.dims, sizes,
                                nullptr, nullptr, 0, nullptr));
  if (!made) throw py::error_already_set();
  return made;
}

void* memory_of_array(const Call& call, const std::string& name, PyObject* out, c10::IntArrayRef shape) {
  using py::detail::npy_api;
  check_numpy_dtype(call, name, out, true);
  const Array& array = array_of(out);
  const View y = view_of(out);
  TORCH_CHECK(y.shape() == shape, "fastmlp: ", name, " has shape ", y.shape(), ", expected ", shape);
  const auto needs = [&](int flag, const char* what) {
    TORCH_CHECK((array.flags & flag) != 0, "fastmlp: ", name, " is not ", what, ", expected an array that is");
  };
  needs(npy_api::NPY_ARRAY_C_CONTIGUOUS_, "contiguous");
  needs(npy_api::NPY_ARRAY_ALIGNED_, "aligned");
  needs(npy_api::NPY_ARRAY_WRITEABLE_, "writeable");
  return array.data;
}

void* memory_of_new_array(const py::object& array) { return array_of(array.ptr()).data; }

PyObject* call_array(const Call& call, PyObject* object, PyObject* out) {
  static const std::string input_name = "input", out_name = "out";
  const View x = view_of_array(call, input_name, object);
  check_shape(call, x);
  const View result = result_of(call, x);
  if (!out) {
    py::object made = new_array(call, result);
    run_on_host(call, x, memory_of_new_array(made));
    return made.release().ptr();
  }
  auto* const data = static_cast<char*>(memory_of_array(call, out_name, out, result.shape()));
  check_apart(x, data, c10::multiply_integers(result.shape()) * call.element(), call.element());
  run_on_host(call, x, data);
  return Py_NewRef(out);
}

}  // namespace fastmlp::frozen

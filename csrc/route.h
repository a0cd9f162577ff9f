// Whether tensors may go straight to the kernels: no transform, mode, subclass or tracing stands
// between them and their data. Asked by bindings.cpp on every call from Python, so it must stay
// within a fraction of a microsecond.
#pragma once

#include <Python.h>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

namespace fastmlp {

// Once, when the module is loaded.
void prepare_routes();

// Null if the input and every parameter are plain, else why they are not.
const char* obstacle(PyObject* input, c10::ArrayRef<PyObject*> parameters);

// The same for one tensor inside backward, where modes and Python's types are out of sight.
bool is_plain(const at::Tensor& tensor);

}  // namespace fastmlp

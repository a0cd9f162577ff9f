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

// Parts of that: whether an object is a tensor of the CPU and nothing else, and whether nothing watches operations.
bool is_plain(PyObject* object);
// Raises TypeError or RuntimeError, which name the argument, if it is not.
void check_plain(const char* name, PyObject* object);
bool is_plain(const at::Tensor& tensor);
bool no_mode_is_active();

// The same for tensors inside backward, where Python's types are out of sight: those that came in, and those that
// were plain when they were saved, but may have been unpacked by a hook.
bool are_plain(at::TensorList incoming, at::TensorList saved);

}  // namespace fastmlp

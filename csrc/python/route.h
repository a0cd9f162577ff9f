// Whether tensors may go straight to the kernels: no transform, mode, subclass or tracing stands between them and their
// data. Asked at every call by bindings.cpp, sequential.cpp, the frozen networks, TrainStep and the optimizers, and by
// autograd.cpp in backward. Must stay within a fraction of a microsecond.
#pragma once

#include <Python.h>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

namespace fastmlp {

// Once, when the module is loaded.
void prepare_routes();

// Null if the input and every parameter are plain, else why they are not.
const char* obstacle(PyObject* input, c10::ArrayRef<PyObject*> parameters);

// Parts of that: whether an object is a tensor of a device with kernels and nothing else, and whether nothing watches
// operations.
bool is_plain(PyObject* object);
bool is_plain(const at::Tensor& tensor);
bool no_mode_is_active();
bool forward_mode_is_open();
// Whether an object is a plain tensor whose numbers the host can read.
bool is_plain_on_host(PyObject* object);
// Raises TypeError or RuntimeError, which name the argument, if it is no plain tensor of a device that trains.
void check_plain(const char* name, PyObject* object);

// The same for tensors inside backward, where Python's types are out of sight: those that came in, and those that
// were plain when they were saved, but may have been unpacked by a hook.
bool are_plain(at::TensorList incoming, at::TensorList saved);

}  // namespace fastmlp

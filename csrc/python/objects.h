// How objects of Python are read: interned names, dictionaries, numbers, flags and lists, some nanoseconds each. Used
// by whatever in this folder reads modules, losses and optimizers. Must be called with the GIL. What is returned as a
// PyObject* is borrowed: it lives until code of Python runs.
#pragma once

#include <c10/util/ArrayRef.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <cstdint>
#include <optional>

namespace fastmlp {

// A name as Python compares it fastest: by address. Lives as long as the process.
inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// The names of attributes and entries that this folder asks for; those of losses and optimizers are in contract/.
struct Names {
  // Of a class.
  PyObject* call = interned("__call__");
  PyObject* forward = interned("forward");
  // Of a module.
  PyObject* modules = interned("_modules");
  PyObject* parameters = interned("_parameters");
  PyObject* buffers = interned("_buffers");
  PyObject* compiled = interned("_compiled_call_impl");
  std::array<PyObject*, 4> hooks = {interned("_forward_hooks"), interned("_forward_pre_hooks"),
                                    interned("_backward_hooks"), interned("_backward_pre_hooks")};
  PyObject* weight = interned("weight");
  PyObject* bias = interned("bias");
  PyObject* activation = interned("activation");
  PyObject* kind = interned("kind");
  PyObject* scalars = interned("scalars");
  PyObject* approximate = interned("approximate");
  PyObject* training = interned("training");
  PyObject* p = interned("p");
  PyObject* reduction = interned("reduction");
  // Of an optimizer.
  PyObject* param_groups = interned("param_groups");
  PyObject* params = interned("params");
  PyObject* state = interned("state");
  PyObject* step = interned("step");
  PyObject* zero_grad = interned("zero_grad");
  PyObject* called = interned("_opt_called");
  std::array<PyObject*, 2> step_hooks = {interned("_optimizer_step_pre_hooks"), interned("_optimizer_step_post_hooks")};
  // What a scaler of gradients leaves on an optimizer.
  std::array<PyObject*, 2> scaler = {interned("grad_scale"), interned("found_inf")};
  // What a scheduler leaves on the function that it puts in the place of an optimizer's step.
  PyObject* marked = interned("_wrapped_by_lr_sched");
  PyObject* wrapped = interned("__wrapped__");
  // Of a frozen network.
  PyObject* reload = interned("_reload");
  PyObject* input = interned("input");
  PyObject* out = interned("out");
};
const Names& names();

// The value under a key; null if there is none. Raises what comparing keys raises.
PyObject* item(PyObject* dict, PyObject* key);
// The __dict__ of an object that has one; raises else.
py::object attributes_of(PyObject* object);
// Whether a dictionary holds anything; a null pointer and other objects do not.
inline bool filled(PyObject* dict) { return dict && PyDict_Check(dict) && PyDict_GET_SIZE(dict) > 0; }

// A float, or an int that a float can hold; none for a null pointer and all else.
std::optional<double> number_of(PyObject* object);
// An int of 64 bits; none for a null pointer and all else.
std::optional<int64_t> integer_of(PyObject* object);
bool is_true(PyObject* object);
// Whether an object is this text; not if it is null.
inline bool is_text(PyObject* object, const char* text) {
  return object && PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, text) == 0;
}

// The items of a list or tuple, which no code of Python may change meanwhile.
inline c10::ArrayRef<PyObject*> items_of(PyObject* list_or_tuple) {
  return {PySequence_Fast_ITEMS(list_or_tuple), size_t(PySequence_Fast_GET_SIZE(list_or_tuple))};
}

// Whether some object stands in a list twice.
bool has_repeats(c10::ArrayRef<PyObject*> objects);

}  // namespace fastmlp

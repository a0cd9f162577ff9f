// Runs the children of a Sequential: each longest run of layers and activations as one operation, every other child
// by its own call. Nothing is remembered between calls, since hooks, parametrizations and swapped parameters come
// unannounced: what a child is, is read from it each time. Called by bindings.cpp with the GIL; fastmlp/modules.py
// holds the same rule for Dynamo, which cannot see into this one.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fastmlp {

// What fastmlp/modules.py knows and this file is told once: the exact classes of torch.nn and of ours that may be part
// of a run.
//   linear, fused_linear: classes of layers; dropout: one that does nothing outside of training
//   sequential: the class whose forward is run_children
//   activations: {class: (name, (attribute of each parameter, ...))}
//   kinds: {name: kind}
//   forwards: {class: how it computes}; a class that is not in it, or computes otherwise by now, is called
//   watchers: dictionaries of hooks on all modules; while one holds anything every child is called
//   composed: function(has_bias, kinds, scalars, input, parameters) -> output, for tensors that are not plain
void register_modules(const py::object& linear, const py::object& fused_linear, const py::object& dropout,
                      const py::object& sequential, const py::dict& activations, const py::dict& kinds,
                      const py::dict& forwards, const py::tuple& watchers, const py::function& composed);

// `children`: the dictionary of modules. Raises what children raise.
py::object run_children(const py::dict& children, py::object input);

// One layer by itself, a fastmlp.Linear; None if its parameters are not where torch.nn.Linear keeps them, or the input
// is no tensor.
py::object run_layer(const py::handle& layer, const py::object& input);

// What torch.nn.Module.__call__ would return for a fastmlp.Sequential or fastmlp.Linear and the arguments of a call;
// NotImplemented if that has to see the call: for hooks, a compiled or replaced forward, tracing.
py::object call_module(const py::handle& module, const py::tuple& args, const py::dict& kwargs);

}  // namespace fastmlp

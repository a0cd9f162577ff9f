// Runs the children of a Sequential: each longest run of layers and activations as one operation, every other child
// by its own call. Nothing is remembered between calls: what a child is, modules.h reads from it each time. Called by
// bindings.cpp with the GIL.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fastmlp {

// function(has_bias, activations, scalars, input, parameters, names) -> output, for tensors that are not plain. Held
// for the life of the process.
void set_composed_forward(const py::function& function);

// `children`: the dictionary of modules. Raises what children raise.
py::object run_children(const py::dict& children, py::object input);

// What a list of modules is if it is one run: has_bias, activations and scalars of its layers as tuples, and a tuple of
// their parameters. None if it is not.
py::object whole_run(const py::list& modules);

// One layer by itself, a fastmlp.Linear; None if its parameters are not where torch.nn.Linear keeps them, or the input
// is no tensor.
py::object run_layer(const py::handle& layer, const py::object& input);

// What torch.nn.Module.__call__ would return for a fastmlp.Sequential or fastmlp.Linear and the arguments of a call;
// NotImplemented if that has to see the call: for hooks, a compiled or replaced forward, tracing.
py::object call_module(const py::handle& module, const py::tuple& args, const py::dict& kwargs);

}  // namespace fastmlp

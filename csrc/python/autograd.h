// The autograd node of the direct route: fused forward, fused backward. Called by bindings.cpp and sequential.cpp for
// plain tensors only; what a backward pass cannot do with plain tensors alone (higher order, batched gradients) it
// leaves to a function of Python, which composes PyTorch's operations. Must not compute a network itself, because the
// operations of the device do (tensors/devices.h).
#pragma once

#include <Python.h>

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include "../tensors/checks.h"
#include "../tensors/stack.h"

namespace fastmlp {

// The network's output, with a graph if grad mode is on and an argument requires a gradient. Under autocast of the
// input's device in its dtype, unless a layer drops: a stack in which one does must not come here then. Called with the
// GIL, which is released meanwhile unless that would take longer than the work; `input` belongs to the caller,
// parameters may be borrowed. `names` is asked with the GIL, and only for an error.
at::Tensor run(const c10::intrusive_ptr<Stack>& stack, const at::Tensor& input, at::TensorList parameters,
               NamesOf names = {});

// The gradient of an activation's argument from that of its output, and the output, which is all that the kernels keep
// of these: by an operation of torch, which can be differentiated further.
bool has_gradient_from_output(int kind);
at::Tensor gradient_from_output(int kind, const at::Tensor& grad, const at::Tensor& output);

// The output of one layer, which is known already, with the graph that `run` would give it. The layer's derivative
// follows from its output.
at::Tensor with_graph(const c10::intrusive_ptr<Stack>& stack, const at::Tensor& input, at::TensorList parameters,
                      const at::Tensor& output);

// Whether autocast of the input's device is on.
bool autocast_is_active(const at::Tensor& input);

// Once, when the module is loaded: what Python calls the node. By default torch takes the end of the C++ name, which
// for a template is "FusedNetwork>".
void name_node();

// function(has_bias, activations, scalars, dropouts, needs, grad, input, parameters, saved) -> gradients, None
// where not needed. Held for the life of the process.
void set_composed_backward(PyObject* function);

}  // namespace fastmlp

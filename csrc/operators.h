// Signatures that every device implements for the schemas of bindings.cpp (devices.h lists those that did); called by
// the dispatcher (flat lists) and directly by Python (a Stack). `register.cpp` of a device and meta.cpp define them.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "stack.h"

namespace fastmlp {

using Tensors = std::vector<at::Tensor>;

namespace cpu {

// y and what backward needs besides it (Stack::hidden tensors).
std::tuple<at::Tensor, Tensors> forward(const Stack& stack, const at::Tensor& input, at::TensorList parameters);
at::Tensor infer(const Stack& stack, const at::Tensor& input, at::TensorList parameters);
// One gradient for the input and one for each parameter; undefined where not needed.
Tensors backward(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                 at::TensorList parameters, const std::vector<bool>& needs);

// The same into memory of the caller, row-major without gaps; what they write is not checked. No
// `hidden` means that nothing is kept; an undefined gradient is not computed.
void forward_into(const Stack& stack, const at::Tensor& input, at::TensorList parameters, const at::Tensor& output,
                  at::TensorList hidden);
void backward_into(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                   at::TensorList parameters, const Tensors& grads);

}  // namespace cpu
}  // namespace fastmlp

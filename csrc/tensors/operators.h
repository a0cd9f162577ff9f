// Signatures that every device implements for the schemas of bindings.cpp (devices.h lists those that did); called by
// the dispatcher (flat lists) and directly by Python (a Stack). `register.cpp` of a device and meta.cpp define them.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "../contract/loss.h"
#include "stack.h"
#include "../contract/update.h"

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
                   at::TensorList parameters, at::TensorList grads);

// Memory for a result: not initialised, row-major without gaps, of the dtype and device of `like`.
at::Tensor uninitialised(at::IntArrayRef sizes, const at::Tensor& like);

// Forward, loss and backward at once; the gradients that are defined are written. The target of cross entropy holds
// classes, in int64; `weight` is undefined where there is none. `memory` is kept by the caller for the next call.
double train_into(const Stack& stack, const at::Tensor& input, at::TensorList parameters, const LossSpec& spec,
                  const at::Tensor& target, const at::Tensor& weight, at::TensorList grads, at::Tensor& memory);

void update(const std::vector<Update>& updates);

}  // namespace cpu
}  // namespace fastmlp

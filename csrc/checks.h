// The one set of argument checks of all devices and routes: each error names the argument, what was
// given and what was expected, and is raised before anything is allocated or written. Shapes are
// read as SymInt, so that the checks also serve meta and fake tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include "stack.h"

namespace fastmlp {

// As users write it: "torch.float32".
const char* dtype_name(at::ScalarType dtype);

// Raises RuntimeError, as torch does for shapes, dtypes and devices. `same_dtype` is false where
// autocast is about to make the dtypes equal.
void check_forward(const Stack& stack, const at::Tensor& input, at::TensorList parameters, bool same_dtype = true);

// `needs`: whether the gradient of the input and of each parameter is asked for.
void check_backward(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                    at::TensorList parameters, const std::vector<bool>& needs);

}  // namespace fastmlp

// The one set of argument checks of all devices and routes: each error names the argument, what was given, what was
// expected and the remedy, and is raised before anything is allocated or written. Called by operations.h, meta.cpp and
// csrc/python. Must read shapes as SymInt, because the checks also serve meta and fake tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <string>
#include <vector>

#include "stack.h"

namespace fastmlp {

// What errors call the arguments of layers that a module holds. Without it errors name them as `functional` does:
// "weight", or "weights[1]" in a longer network.
struct ModuleNames {
  std::string input;                // "input", or "the input of 2" where other children precede the layers
  std::vector<std::string> layers;  // where the module keeps each layer: "2", or "" for the module itself
};

// Names are put together only when an error is written.
using NamesOf = c10::function_ref<ModuleNames()>;

// Raises RuntimeError, as torch does for shapes, dtypes and devices. `same_dtype` is false where
// autocast is about to make the dtypes equal. `names` is null for a call of `functional`.
void check_forward(const Stack& stack, const at::Tensor& input, at::TensorList parameters, bool same_dtype = true,
                   const ModuleNames* names = nullptr);

// `needs`: whether the gradient of the input and of each parameter is asked for.
void check_backward(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                    at::TensorList parameters, const std::vector<bool>& needs);

}  // namespace fastmlp

// torch.nn.utils.clip_grad_norm_ and clip_grad_value_ in one call for all gradients. Used by fastmlp/clip.py through
// bindings.cpp and by train_step.cpp, with the GIL. Computes nothing: cpu/clip.cpp does.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "../contract/clip.h"

namespace fastmlp {

// Scales gradients so that their norm is at most max_norm, and returns the norm that they had, in the dtype that torch
// gives it. None, and nothing written, if there is no gradient, if one is not for the kernels, or if the norm is not
// finite and has to be.
std::optional<at::Tensor> clip_to_norm(at::TensorList gradients, double max_norm, NormOrder order, bool must_be_finite);

// Clamps gradients to [-limit, limit]. False, and nothing written, if one of them is not for the kernels.
bool clip_to_value(at::TensorList gradients, double limit);

// The same for the gradients of parameters, a tensor or a list or tuple of tensors; none or false also where something
// watches operations, or an argument is one that torch has to read.
std::optional<at::Tensor> clip_grad_norm(const py::object& parameters, const py::object& max_norm,
                                         const py::object& norm_type, const py::object& error_if_nonfinite);
bool clip_grad_value(const py::object& parameters, const py::object& clip_value);

}  // namespace fastmlp

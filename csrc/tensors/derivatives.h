// Derivatives of networks along their input as operators of the dispatcher: checks arguments, allocates results and
// asks the device of the input (contract/derivatives.h says what is computed). Registered by the register files of
// devices that have them.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "operators.h"

namespace fastmlp {

// The values [rows, out_features], the first derivatives [rows, out_features, axes], the sums of second derivatives
// [rows, out_features, sums], and what backward reads: without elements unless `keep`. `pairs` holds two places in the
// list of axes for each pair, `pairs_end` how many pairs there are up to the end of each sum.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> derivatives_op(
    const at::Tensor& input, at::TensorList parameters, const c10::List<bool>& has_bias, at::IntArrayRef activations,
    at::ArrayRef<double> scalars, at::IntArrayRef axes, at::IntArrayRef pairs, at::IntArrayRef pairs_end, bool keep);

// The gradients asked for, of the input and of each parameter. An absent gradient with respect to a result is zero.
Tensors derivatives_backward_op(const std::optional<at::Tensor>& grad, const std::optional<at::Tensor>& grad_first,
                                const std::optional<at::Tensor>& grad_second, const at::Tensor& input,
                                const at::Tensor& kept, at::TensorList parameters, const c10::List<bool>& has_bias,
                                at::IntArrayRef activations, at::ArrayRef<double> scalars, at::IntArrayRef axes,
                                at::IntArrayRef pairs, at::IntArrayRef pairs_end, const c10::List<bool>& needs);

}  // namespace fastmlp

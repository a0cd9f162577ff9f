// Tensors -> the structs of contract/problem.h: the pointers and strides of arguments that checks.h has seen. Called by
// operations.h and by the register files of devices. Must not allocate, except for copies of tensors whose leading
// dimensions do not fold into rows.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/MaybeOwned.h>
#include <c10/util/SmallVector.h>

#include <vector>

#include "../contract/loss.h"
#include "../contract/problem.h"
#include "stack.h"

namespace fastmlp {

// The passes point into tensors: those of the caller, and the two-dimensional forms that are kept here.
struct ForwardTensors {
  ForwardPass pass;
  c10::MaybeOwned<at::Tensor> input;
};

struct BackwardTensors {
  BackwardPass pass;
  c10::MaybeOwned<at::Tensor> input, grad;
  c10::SmallVector<c10::MaybeOwned<at::Tensor>, 8> saved, masks;
};

struct StepTensors {
  StepPass pass;
  c10::MaybeOwned<at::Tensor> input;
  c10::SmallVector<at::Tensor, 4> gapless;  // vectors of batch normalisations that had to be copied
};

// `device` is for the error if there are no kernels for the dtype: "CPU". `hidden` begins with what was drawn for
// layers that drop, and no more than that means that nothing is kept.
ForwardTensors forward_pass(const char* device, const Stack& stack, const at::Tensor& input, at::TensorList parameters,
                            const at::Tensor& output, at::TensorList hidden);

// An undefined gradient is not asked for.
BackwardTensors backward_pass(const char* device, const Stack& stack, const at::Tensor& grad, const at::Tensor& input,
                              at::TensorList saved, at::TensorList parameters, at::TensorList grads);

// One gradient for each parameter; an undefined one is not asked for. The target of a loss of classes holds these;
// `weight` is undefined where there is none; `norms` has an entry for each batch normalisation. Nothing is drawn yet
// for layers that drop.
StepTensors step_pass(const char* device, const Stack& stack, const at::Tensor& input, at::TensorList parameters,
                      const LossSpec& spec, const at::Tensor& target, const at::Tensor& weight,
                      c10::ArrayRef<NormTensors> norms, at::TensorList grads);

// Parts of such passes: the network of an input of two dimensions, whose dtype has kernels, and where the gradients of
// its parameters go.
Network network_of(const Stack& stack, const at::Tensor& input, at::TensorList parameters);
void set_gradients(BackwardPass& pass, const Stack& stack, at::TensorList grads);

// Sizes of a result of so many features for each row of the input.
c10::SmallVector<int64_t, 5> sizes_with(const at::Tensor& input, int64_t features);

}  // namespace fastmlp

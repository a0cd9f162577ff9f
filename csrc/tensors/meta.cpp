// The operators on meta tensors: shapes and errors without data. Called by the dispatcher, for device="meta" and,
// because they compute with SymInt, for fake tensors under torch.compile. Must allocate exactly what the devices'
// kernels return.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "checks.h"
#include "operators.h"

namespace fastmlp {
namespace {

at::Tensor row_major(const at::Tensor& input, const c10::SymInt& features) {
  std::vector<c10::SymInt> sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  sizes.back() = features;
  return at::empty_symint(sizes, input.options());
}

std::tuple<at::Tensor, Tensors> forward(const at::Tensor& input, at::TensorList parameters,
                                        const c10::List<bool>& has_bias, at::IntArrayRef activations,
                                        at::ArrayRef<double> scalars) {
  const Stack stack(has_bias.vec(), activations, scalars);
  check_forward(stack, input, parameters);
  Tensors hidden;
  for (size_t l = 0; l < stack.hidden(); l++) {
    hidden.push_back(row_major(input, parameters[stack.weight(l)].sym_size(0)));
  }
  return {row_major(input, parameters[stack.weight(stack.layers() - 1)].sym_size(0)), hidden};
}

at::Tensor infer(const at::Tensor& input, at::TensorList parameters, const c10::List<bool>& has_bias,
                 at::IntArrayRef activations, at::ArrayRef<double> scalars) {
  const Stack stack(has_bias.vec(), activations, scalars);
  check_forward(stack, input, parameters);
  return row_major(input, parameters[stack.weight(stack.layers() - 1)].sym_size(0));
}

Tensors backward(const at::Tensor& grad, const at::Tensor& input, at::TensorList saved, at::TensorList parameters,
                 const c10::List<bool>& has_bias, at::IntArrayRef activations, at::ArrayRef<double> scalars,
                 const c10::List<bool>& needs) {
  const Stack stack(has_bias.vec(), activations, scalars);
  const std::vector<bool> needed(needs.begin(), needs.end());
  check_backward(stack, grad, input, saved, parameters, needed);
  Tensors grads;
  if (needed[0]) grads.push_back(at::empty_symint(input.sym_sizes(), input.options()));
  for (size_t i = 0; i < parameters.size(); i++) {
    if (needed[1 + i]) grads.push_back(at::empty_symint(parameters[i].sym_sizes(), input.options()));
  }
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmlp, Meta, m) {
  m.impl("forward", &forward);
  m.impl("infer", &infer);
  m.impl("backward", &backward);
}

}  // namespace fastmlp

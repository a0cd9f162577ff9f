// Tensors -> problem.h -> cpu::forward and cpu::backward: the only file of the CPU device that knows
// torch. Checks arguments, allocates results, takes the number of threads from torch, and registers
// the operators for the dispatcher.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>

#include "../checks.h"
#include "../operators.h"
#include "network.h"
#include "step.h"
#include "workspace.h"

namespace fastmlp::cpu {
namespace {

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

Matrix matrix_of(const at::Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

// All leading dimensions as rows: a view where strides allow it, a copy where they do not.
c10::MaybeOwned<at::Tensor> as_rows(const at::Tensor& x, int64_t rows) {
  using Rows = c10::MaybeOwned<at::Tensor>;
  return x.dim() == 2 ? Rows::borrowed(x) : Rows::owned(x.reshape({rows, x.size(-1)}));
}

at::Tensor row_major(const at::Tensor& input, int64_t features) {
  c10::SmallVector<int64_t, 5> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = features;
  return uninitialised(sizes, input);
}

// `input` is the two-dimensional form, which the caller keeps alive.
Network network_of(const Stack& stack, const at::Tensor& input, at::TensorList parameters) {
  Network network;
  const std::optional<DType> dtype = dtype_of(input.scalar_type());
  TORCH_CHECK(dtype, "fastmlp: input has dtype ", input.scalar_type(),
              ", expected float32, float64, bfloat16 or float16, for which this build has CPU kernels");
  network.dtype = *dtype;
  network.rows = input.size(0);
  network.input = matrix_of(input);
  network.layers.resize(stack.layers());
  for (size_t l = 0; l < stack.layers(); l++) {
    const at::Tensor& weight = parameters[stack.weight(l)];
    Layer& layer = network.layers[l];
    layer.in_features = weight.size(1);
    layer.out_features = weight.size(0);
    layer.weight = matrix_of(weight);
    if (stack.has_bias(l)) {
      const at::Tensor& bias = parameters[stack.bias(l)];
      layer.bias = {bias.data_ptr(), bias.stride(0)};
    }
    layer.activation = stack.activation(l);
  }
  return network;
}

// Where those of the parameters go.
void set_gradients(BackwardPass& pass, const Stack& stack, at::TensorList grads) {
  const auto data_of = [&](size_t i) { return grads[i].defined() ? grads[i].data_ptr() : nullptr; };
  pass.grad_weights.reserve(stack.layers());
  pass.grad_biases.reserve(stack.layers());
  for (size_t l = 0; l < stack.layers(); l++) {
    pass.grad_weights.push_back(data_of(stack.weight(l)));
    pass.grad_biases.push_back(stack.has_bias(l) ? data_of(stack.bias(l)) : nullptr);
  }
}

int64_t rows_of(const at::Tensor& input) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < input.dim(); d++) rows *= input.size(d);
  return rows;
}

}  // namespace

std::optional<DType> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::float32;
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    default:
      return std::nullopt;
  }
}

at::Tensor uninitialised(at::IntArrayRef sizes, const at::Tensor& like) {
  // Past the dispatcher, which would find the same.
  at::Tensor tensor = at::detail::empty_cpu(sizes, like.scalar_type());
  prefer_huge_pages(tensor.data_ptr(), tensor.nbytes());
  return tensor;
}

void forward_into(const Stack& stack, const at::Tensor& input, at::TensorList parameters, const at::Tensor& output,
                  at::TensorList hidden) {
  const auto rows = as_rows(input, rows_of(input));
  ForwardPass pass;
  pass.network = network_of(stack, *rows, parameters);
  if (!hidden.empty()) pass.kept.resize(stack.layers(), nullptr);
  for (size_t l = 0; l < hidden.size(); l++) pass.kept[l] = hidden[l].data_ptr();
  pass.output = output.data_ptr();
  forward(pass, threads());
}

std::tuple<at::Tensor, Tensors> forward(const Stack& stack, const at::Tensor& input, at::TensorList parameters) {
  check_forward(stack, input, parameters);
  Tensors hidden;
  hidden.reserve(stack.hidden());
  for (size_t l = 0; l < stack.hidden(); l++) {
    hidden.push_back(row_major(input, parameters[stack.weight(l)].size(0)));
  }
  at::Tensor output = row_major(input, parameters[stack.weight(stack.layers() - 1)].size(0));
  forward_into(stack, input, parameters, output, hidden);
  return {output, hidden};
}

at::Tensor infer(const Stack& stack, const at::Tensor& input, at::TensorList parameters) {
  check_forward(stack, input, parameters);
  at::Tensor output = row_major(input, parameters[stack.weight(stack.layers() - 1)].size(0));
  forward_into(stack, input, parameters, output, {});
  return output;
}

void backward_into(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                   at::TensorList parameters, at::TensorList grads) {
  const int64_t rows = rows_of(input);
  const auto flat_input = as_rows(input, rows), flat_grad = as_rows(grad, rows);
  c10::SmallVector<c10::MaybeOwned<at::Tensor>, 8> flat_saved;
  BackwardPass pass;
  pass.network = network_of(stack, *flat_input, parameters);
  pass.grad_output = matrix_of(*flat_grad);
  pass.saved.resize(stack.layers());
  for (size_t l = 0; l < saved.size(); l++) {
    flat_saved.push_back(as_rows(saved[l], rows));
    pass.saved[l] = matrix_of(*flat_saved.back());
  }
  pass.grad_input = grads[0].defined() ? grads[0].data_ptr() : nullptr;
  set_gradients(pass, stack, grads.slice(1));
  backward(pass, threads());
}

Tensors backward(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                 at::TensorList parameters, const std::vector<bool>& needs) {
  check_backward(stack, grad, input, saved, parameters, needs);
  Tensors grads(1 + parameters.size());
  for (size_t i = 0; i < grads.size(); i++) {
    if (!needs[i]) continue;
    const at::Tensor& like = i == 0 ? input : parameters[i - 1];
    grads[i] = uninitialised(like.sizes(), input);
  }
  backward_into(stack, grad, input, saved, parameters, grads);
  return grads;
}

double train_into(const Stack& stack, const at::Tensor& input, at::TensorList parameters, const LossSpec& spec,
                  const at::Tensor& target, const at::Tensor& weight, at::TensorList grads, at::Tensor& memory) {
  const auto rows = as_rows(input, rows_of(input));
  StepPass pass;
  pass.backward.network = network_of(stack, *rows, parameters);
  set_gradients(pass.backward, stack, grads);
  pass.targets.spec = spec;
  if (spec.kind == cross_entropy_kind) {
    pass.targets.classes = target.const_data_ptr<int64_t>();
  } else {
    pass.targets.target = target.data_ptr();
  }
  pass.targets.weight = weight.defined() ? weight.data_ptr() : nullptr;
  const int64_t bytes = int64_t(train_bytes(pass));
  if (bytes > 0 && (!memory.defined() || memory.numel() < bytes)) {
    memory = at::detail::empty_cpu({bytes}, at::kByte);
    prefer_huge_pages(memory.data_ptr(), memory.nbytes());
  }
  return train(pass, bytes > 0 ? memory.data_ptr() : nullptr, threads());
}

void update(const std::vector<Update>& updates) { update(updates, threads()); }

namespace {

std::tuple<at::Tensor, Tensors> forward_op(const at::Tensor& input, at::TensorList parameters,
                                           const c10::List<bool>& has_bias, at::IntArrayRef activations,
                                           at::ArrayRef<double> scalars) {
  return forward(Stack(has_bias, activations, scalars), input, parameters);
}

at::Tensor infer_op(const at::Tensor& input, at::TensorList parameters, const c10::List<bool>& has_bias,
                    at::IntArrayRef activations, at::ArrayRef<double> scalars) {
  return infer(Stack(has_bias, activations, scalars), input, parameters);
}

Tensors backward_op(const at::Tensor& grad, const at::Tensor& input, at::TensorList saved, at::TensorList parameters,
                    const c10::List<bool>& has_bias, at::IntArrayRef activations, at::ArrayRef<double> scalars,
                    const c10::List<bool>& needs) {
  const std::vector<bool> needed(needs.begin(), needs.end());
  Tensors all = backward(Stack(has_bias, activations, scalars), grad, input, saved, parameters, needed);
  Tensors grads;
  for (size_t i = 0; i < all.size(); i++) {
    if (needed[i]) grads.push_back(std::move(all[i]));
  }
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmlp, CPU, m) {
  m.impl("forward", &forward_op);
  m.impl("infer", &infer_op);
  m.impl("backward", &backward_op);
}

}  // namespace fastmlp::cpu

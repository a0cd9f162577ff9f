// What derivatives.h declares. Must not compute: the device's entries in the table do.
#include "derivatives.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include <vector>

#include "../contract/shape.h"
#include "checks.h"
#include "devices.h"
#include "dtypes.h"
#include "passes.h"

namespace fastmlp {
namespace {

// Raises RuntimeError for places that do not exist.
Directions directions_of(const at::Tensor& input, at::IntArrayRef axes, at::IntArrayRef pairs,
                         at::IntArrayRef pairs_end) {
  TORCH_CHECK(pairs.size() % 2 == 0, "fastmlp: pairs has ", pairs.size(), " entries, expected two for each pair");
  Directions directions;
  for (const int64_t axis : axes) {
    TORCH_CHECK(axis >= 0 && axis < input.size(-1), "fastmlp: axes holds ", axis, ", expected 0 to ",
                input.size(-1) - 1, ", since input has shape ", input.sizes());
    directions.axes.push_back(axis);
  }
  const int64_t firsts = int64_t(axes.size()), count = int64_t(pairs.size() / 2);
  for (const int64_t place : pairs) {
    TORCH_CHECK(place >= 0 && place < firsts, "fastmlp: pairs holds ", place, ", expected 0 to ", firsts - 1,
                ", a place in axes");
  }
  for (int64_t i = 0; i < count; i++) directions.pairs.push_back({int(pairs[2 * i]), int(pairs[2 * i + 1])});
  int64_t before = 0;
  for (const int64_t end : pairs_end) {
    TORCH_CHECK(end >= before && end <= count, "fastmlp: pairs_end holds ", end, ", expected ", before, " to ", count);
    directions.pairs_end.push_back(int(end));
    before = end;
  }
  return directions;
}

// Raises RuntimeError for arguments that the device has no kernels for.
const DeviceOperations& checked(const Stack& stack, const at::Tensor& input, at::TensorList parameters) {
  check_forward(stack, input, parameters);
  TORCH_CHECK(input.dim() == 2, "fastmlp: input has shape ", input.sizes(), ", expected two dimensions");
  TORCH_CHECK(input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble, "fastmlp: input has dtype ",
              dtype_name(input.scalar_type()), ", expected float32 or float64");
  const DeviceOperations& device = operations_for(input);
  TORCH_CHECK(device.derivatives && device.derivatives_backward, "fastmlp: input is on ", input.device(), ", expected ",
              devices_in_words(&derives), ", which has kernels for derivatives");
  return device;
}

// Adds the matrices of a gradient, of which each lies along the last dimension; `count` times null if it is absent.
void add_grads(const char* name, const std::optional<at::Tensor>& grad, at::IntArrayRef sizes, const at::Tensor& input,
               std::vector<Matrix>& grads) {
  const int64_t count = sizes.back();
  if (!grad || !grad->defined()) {
    grads.resize(grads.size() + size_t(count));
    return;
  }
  TORCH_CHECK(grad->sizes() == sizes && grad->scalar_type() == input.scalar_type() &&
                  grad->device() == input.device() && grad->layout() == at::kStrided,
              "fastmlp: ", name, " has shape ", grad->sizes(), " and dtype ", dtype_name(grad->scalar_type()), " on ",
              grad->device(), ", expected ", sizes, " and ", dtype_name(input.scalar_type()), " on ", input.device());
  char* const data = static_cast<char*>(grad->data_ptr());
  for (int64_t i = 0; i < count; i++) {
    grads.push_back({data + i * grad->stride(2) * int64_t(grad->element_size()), grad->stride(0), grad->stride(1)});
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> derivatives_op(
    const at::Tensor& input, at::TensorList parameters, const c10::List<bool>& has_bias, at::IntArrayRef activations,
    at::ArrayRef<double> scalars, at::IntArrayRef axes, at::IntArrayRef pairs, at::IntArrayRef pairs_end, bool keep) {
  const at::AutoDispatchBelowADInplaceOrView guard;  // else autograd would take results for views
  const Stack stack(has_bias.vec(), activations, scalars);
  const DeviceOperations& device = checked(stack, input, parameters);
  DerivativesForward pass;
  pass.directions = directions_of(input, axes, pairs, pairs_end);
  pass.network = network_of(stack, input, parameters);
  const int64_t rows = input.size(0), features = pass.network.layers.back().out_features;
  const int64_t firsts = pass.directions.firsts(), seconds = pass.directions.seconds();
  const int64_t kept_size = keep ? rows * pass.directions.components() * kept_features(pass.network) : 0;
  const at::Tensor value = device.empty({rows, features}, input), kept = device.empty({kept_size}, input);
  // Each derivative lies without gaps, as the kernels write it.
  const at::Tensor first = device.empty({firsts, rows, features}, input);
  const at::Tensor second = device.empty({seconds, rows, features}, input);
  pass.kept = keep ? kept.data_ptr() : nullptr;
  pass.outputs.push_back(value.data_ptr());
  for (const at::Tensor& all : {first, second}) {
    for (int64_t i = 0; i < all.size(0); i++) {
      pass.outputs.push_back(static_cast<char*>(all.data_ptr()) + i * rows * features * int64_t(all.element_size()));
    }
  }
  device.derivatives(pass);
  return {value, first.permute({1, 2, 0}), second.permute({1, 2, 0}), kept};
}

Tensors derivatives_backward_op(const std::optional<at::Tensor>& grad, const std::optional<at::Tensor>& grad_first,
                                const std::optional<at::Tensor>& grad_second, const at::Tensor& input,
                                const at::Tensor& kept, at::TensorList parameters, const c10::List<bool>& has_bias,
                                at::IntArrayRef activations, at::ArrayRef<double> scalars, at::IntArrayRef axes,
                                at::IntArrayRef pairs, at::IntArrayRef pairs_end, const c10::List<bool>& needs) {
  const Stack stack(has_bias.vec(), activations, scalars);
  const DeviceOperations& device = checked(stack, input, parameters);
  TORCH_CHECK(needs.size() == 1 + stack.parameters(), "fastmlp: needs has ", needs.size(), " entries, expected ",
              1 + stack.parameters(), ", one for the input and one for each parameter");
  DerivativesBackward pass;
  pass.directions = directions_of(input, axes, pairs, pairs_end);
  Network& network = pass.pass.network = network_of(stack, input, parameters);
  const int64_t rows = input.size(0), features = network.layers.back().out_features;
  const int64_t kept_size = rows * pass.directions.components() * kept_features(network);
  TORCH_CHECK(kept.scalar_type() == input.scalar_type() && kept.device() == input.device() && kept.is_contiguous() &&
                  kept.numel() == kept_size,
              "fastmlp: kept has ", kept.numel(), " elements, expected ", kept_size,
              " without gaps, of the dtype and on the device of input");
  pass.kept = kept.const_data_ptr();
  std::optional<at::Tensor> values;
  if (grad && grad->defined()) values = grad->unsqueeze(-1);
  add_grads("grad", values, {rows, features, 1}, input, pass.grads);
  add_grads("grad_first", grad_first, {rows, features, pass.directions.firsts()}, input, pass.grads);
  add_grads("grad_second", grad_second, {rows, features, pass.directions.seconds()}, input, pass.grads);
  Tensors grads(1 + parameters.size()), found;
  for (size_t i = 0; i < grads.size(); i++) {
    if (!needs[i]) continue;
    grads[i] = device.empty((i == 0 ? input : parameters[i - 1]).sizes(), input);
    found.push_back(grads[i]);
  }
  if (needs[0]) pass.pass.grad_input = grads[0].data_ptr();
  set_gradients(pass.pass, stack, at::TensorList(grads).slice(1));
  device.derivatives_backward(pass);
  return found;
}

}  // namespace fastmlp

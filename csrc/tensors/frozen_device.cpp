// The network of frozen_device.h, by PyTorch's copies and devices.h.
#include "frozen_device.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>

#include <utility>

#include "checks.h"
#include "devices.h"

namespace fastmlp {

DeviceNetwork::DeviceNetwork(const Stack& stack, const Tensors& parameters) : stack_(stack) {
  TORCH_CHECK(!parameters.empty() && parameters.front().dim() == 2, "fastmlp: weights[0] must be a matrix");
  // Written again later, in whatever mode.
  const c10::InferenceMode inference(false);
  const at::NoGradGuard guard;
  check_forward(stack, at::empty({0, parameters.front().size(1)}, parameters.front().options()), parameters);
  for (const at::Tensor& parameter : parameters) {
    parameters_.push_back(at::empty(parameter.sizes(), parameter.options()).copy_(parameter));
  }
}

bool DeviceNetwork::refill(const Stack& stack, const Tensors& parameters) {
  bool same = stack.layers() == stack_.layers() && parameters.size() == parameters_.size();
  for (size_t l = 0; same && l < stack.layers(); l++) {
    const ActivationSpec &one = stack.activation(l), &other = stack_.activation(l);
    same = stack.has_bias(l) == stack_.has_bias(l) && one.kind == other.kind && one.scalars.a == other.scalars.a &&
           one.scalars.b == other.scalars.b;
  }
  for (size_t i = 0; same && i < parameters.size(); i++) {
    same = parameters[i].sizes() == parameters_[i].sizes() && parameters[i].device() == parameters_[i].device() &&
           parameters[i].scalar_type() == parameters_[i].scalar_type();
  }
  if (!same) return false;
  const at::NoGradGuard guard;
  for (size_t i = 0; i < parameters.size(); i++) parameters_[i].copy_(parameters[i]);
  return true;
}

at::Tensor DeviceNetwork::empty(at::IntArrayRef sizes) const { return at::empty(sizes, parameters_.front().options()); }

void DeviceNetwork::run(const at::Tensor& input, const at::Tensor& output) const {
  const at::AutoDispatchBelowADInplaceOrView guard;
  infer_into(stack_, input, parameters_, output);
}

int64_t DeviceNetwork::bytes() const {
  int64_t sum = 0;
  for (const at::Tensor& parameter : parameters_) sum += int64_t(parameter.nbytes());
  return sum;
}

}  // namespace fastmlp

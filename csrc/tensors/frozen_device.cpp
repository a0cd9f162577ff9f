// Copies parameters and calls the inference of their device, as frozen_device.h describes. Called by frozen.cpp and
// frozen_load.cpp through the interface of frozen_network.h. Must wait for nothing: calls only queue work.
#include "frozen_device.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/empty.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>

#include <limits>
#include <utility>

#include "checks.h"
#include "devices.h"

namespace fastmlp {
namespace {

std::vector<at::Tensor> flat(const FrozenNetwork::Parameters& parameters) {
  const auto& [weights, biases] = parameters;
  std::vector<at::Tensor> all;
  for (size_t l = 0; l < weights.size(); l++) {
    all.push_back(weights[l]);
    if (biases[l]) all.push_back(*biases[l]);
  }
  return all;
}

FrozenNetwork::Form form_of(const Stack& stack, const FrozenNetwork::Parameters& parameters, Head head) {
  int64_t bytes = 0;
  for (const at::Tensor& parameter : flat(parameters)) bytes += int64_t(parameter.nbytes());
  const at::Tensor& first = parameters.weights.front();
  return {
      .layers = stack.specs().vec(),
      .features = features_of(parameters.weights),
      .device = first.device(),
      .dtype = first.scalar_type(),
      .end_dtype = first.scalar_type(),
      .head = head,
      .bytes = bytes,
      .takes_arrays = false,
      .multiply_adds = std::numeric_limits<double>::infinity(),
  };
}

}  // namespace

std::vector<int64_t> features_of(at::TensorList weights) {
  std::vector<int64_t> features{weights.front().size(1)};
  for (const at::Tensor& weight : weights) features.push_back(weight.size(0));
  return features;
}

DeviceNetwork::DeviceNetwork(const Stack& stack, const Parameters& parameters, Head head)
    : FrozenNetwork(form_of(stack, parameters, head)), stack_(stack) {
  // Written again later, in whatever mode.
  const c10::InferenceMode inference(false);
  const at::NoGradGuard guard;
  const std::vector<at::Tensor> given = flat(parameters);
  check_forward(stack, at::empty({0, form().in_features()}, given.front().options()), given);
  for (const at::Tensor& parameter : given) {
    flat_.push_back(at::empty(parameter.sizes(), parameter.options()).copy_(parameter));
  }
}

bool DeviceNetwork::refill(const Stack& stack, const Parameters& parameters, Head head) {
  const std::vector<at::Tensor> given = flat(parameters);
  bool same = head == form().head && stack.specs() == stack_.specs() && given.size() == flat_.size();
  for (size_t i = 0; same && i < given.size(); i++) {
    same = given[i].sizes() == flat_[i].sizes() && given[i].device() == flat_[i].device() &&
           given[i].scalar_type() == flat_[i].scalar_type();
  }
  if (!same) return false;
  const at::NoGradGuard guard;
  for (size_t i = 0; i < given.size(); i++) flat_[i].copy_(given[i]);
  return true;
}

at::Tensor DeviceNetwork::empty(at::IntArrayRef sizes) const { return at::empty(sizes, flat_.front().options()); }

void DeviceNetwork::run(const FrozenBatch& batch) const {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Head head = form().head;
  if (head == Head::none) return forward_into(stack_, *batch.input_tensor, flat_, *batch.output_tensor, {});
  const at::Tensor last = at::empty(batch.output_tensor->sizes(), batch.output_tensor->options());
  forward_into(stack_, *batch.input_tensor, flat_, last, {});
  at::Tensor output = *batch.output_tensor;
  head == Head::softmax ? at::_softmax_out(output, last, -1, false) : at::_log_softmax_out(output, last, -1, false);
}

FrozenNetwork::Parameters DeviceNetwork::parameters() const {
  Parameters all;
  for (size_t l = 0; l < stack_.layers(); l++) {
    all.weights.push_back(flat_[stack_.weight(l)]);
    all.biases.push_back(stack_.has_bias(l) ? std::optional(flat_[stack_.bias(l)]) : std::nullopt);
  }
  return all;
}

}  // namespace fastmlp

// A node that draws random numbers as an operator of torch does. Made in csrc/python/capture_nodes.cpp.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>

#include "../tensors/devices.h"
#include "node.h"

namespace fastmlp {

// Raises an error unless the device can fill the tensor with probability p.
void check_bernoulli(const at::Tensor& tensor, double p);

class BernoulliNode final : public Node {
 public:
  BernoulliNode(at::Tensor tensor, double p, std::optional<at::Generator> generator)
      : tensor_(std::move(tensor)), p_(p), generator_(std::move(generator)) {
    check_bernoulli(tensor_, p_);
    draw_ = operations_for(tensor_).bernoulli;
  }

  void run() override { draw_(tensor_, p_, generator_); }
  const char* name() const override { return "bernoulli"; }

 private:
  const at::Tensor tensor_;
  const double p_;
  const std::optional<at::Generator> generator_;
  operation::Bernoulli* draw_;
};

}  // namespace fastmlp

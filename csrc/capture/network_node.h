// A step of a tape that is a frozen network: its rows have the same bits however many of them there are. Made by
// frozen_graph.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "../tensors/frozen_network.h"
#include "node.h"

namespace fastmlp {

class NetworkNode final : public Node {
 public:
  // input: [rows, in_features] of any strides; output: [rows, out_features] without gaps.
  NetworkNode(std::shared_ptr<const FrozenNetwork> network, const at::Tensor& input, const at::Tensor& output);

  void run() override {
    view_.data = static_cast<const char*>(from_);
    network_->run({view_, to_});
  }
  const char* name() const override { return "network"; }

 private:
  const std::shared_ptr<const FrozenNetwork> network_;
  StridedView view_;
  const void* from_ = nullptr;
  void* to_ = nullptr;
};

}  // namespace fastmlp

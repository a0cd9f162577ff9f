// A frozen network on a device whose kernels take weights as they are: a copy of the parameters there, and calls of the
// device's own inference (devices.h). Made by python/frozen_load.cpp where a device has no form of its own. Must not
// check arguments of a call, because its callers have.
#pragma once

#include "frozen_network.h"

namespace fastmlp {

class DeviceNetwork final : public FrozenNetwork {
 public:
  // Copies the parameters, all of one device and one dtype.
  DeviceNetwork(const Stack& stack, const Parameters& parameters, Head head);

  at::Tensor empty(at::IntArrayRef sizes) const override;
  // The input is strided as it likes.
  void run(const FrozenBatch& batch) const override;
  // The network's own tensors.
  Parameters parameters() const override;
  bool refill(const Stack& stack, const Parameters& parameters, Head head) override;

 private:
  Stack stack_;
  std::vector<at::Tensor> flat_;  // in the order of stack.h
};

}  // namespace fastmlp

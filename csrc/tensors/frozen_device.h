// A frozen network on a device whose kernels take weights as they are: a copy of the parameters there, and calls of the
// device's inference (devices.h). Used by frozen.cpp, which checks arguments; the CPU's own form, with packed weights,
// is cpu/frozen.h.
#pragma once

#include <ATen/core/Tensor.h>

#include "operators.h"
#include "stack.h"

namespace fastmlp {

class DeviceNetwork {
 public:
  // Copies the parameters (stack.h has their order), all of one device and one dtype.
  DeviceNetwork(const Stack& stack, const Tensors& parameters);

  // Writes other values of the parameters over the old ones, where graphs that captured a call find them too. False,
  // and nothing is done, if the layers are not the same but for that.
  bool refill(const Stack& stack, const Tensors& parameters);

  // Memory for a result.
  at::Tensor empty(at::IntArrayRef sizes) const;
  // `input` is strided as it likes, `output` has rows without gaps.
  void run(const at::Tensor& input, const at::Tensor& output) const;

  const Stack& stack() const { return stack_; }
  const Tensors& parameters() const { return parameters_; }
  at::Device device() const { return parameters_.front().device(); }
  at::ScalarType dtype() const { return parameters_.front().scalar_type(); }
  int64_t in_features() const { return parameters_.front().size(1); }
  int64_t out_features() const { return parameters_[stack_.weight(stack_.layers() - 1)].size(0); }
  int64_t bytes() const;

 private:
  Stack stack_;
  Tensors parameters_;
};

}  // namespace fastmlp

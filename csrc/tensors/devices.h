// Which devices this build has kernels for: a register file adds its device when the library is loaded. Asked by
// route.cpp and autograd.cpp, which know no device by name, and by bindings.cpp.
#pragma once

#include <c10/core/Device.h>

#include <string>
#include <vector>

#include "operators.h"

namespace fastmlp {

struct DeviceOperations {
  decltype(&cpu::forward) forward;
  decltype(&cpu::infer) infer;
  decltype(&cpu::backward) backward;
  decltype(&cpu::forward_into) forward_into;
  // Null, or why the kernels cannot run on this device of the type, as on a card that the build has no code for. Asked
  // once of each device. Null itself where they run on every one.
  const char* (*obstacle)(c10::DeviceIndex device) = nullptr;
};

// For a namespace-scope object of a register file.
struct RegisterDevice {
  RegisterDevice(c10::DeviceType device, const DeviceOperations& operations);
};

// Null if there are no kernels for the device.
const DeviceOperations* operations_on(c10::DeviceType device);

// Their names, as torch spells them.
std::vector<std::string> device_names();

// Null, or why tensors of the device cannot go to kernels. Without an index: of no device of the type.
const char* device_obstacle(c10::Device device);

// On the device of the input. Raise RuntimeError if there are no kernels for its type.
std::tuple<at::Tensor, Tensors> forward(const Stack& stack, const at::Tensor& input, at::TensorList parameters);
at::Tensor infer(const Stack& stack, const at::Tensor& input, at::TensorList parameters);
// Into memory of the caller, row-major without gaps. Nothing is checked but the device.
void infer_into(const Stack& stack, const at::Tensor& input, at::TensorList parameters, const at::Tensor& output);
Tensors backward(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                 at::TensorList parameters, const std::vector<bool>& needs);

}  // namespace fastmlp

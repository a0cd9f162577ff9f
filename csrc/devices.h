// Which devices this build has kernels for: a register file adds its device when the library is loaded. Asked by
// route.cpp and autograd.cpp, which know no device by name, and by bindings.cpp.
#pragma once

#include <c10/core/DeviceType.h>

#include <string>
#include <vector>

#include "operators.h"

namespace fastmlp {

struct DeviceOperations {
  decltype(&cpu::forward) forward;
  decltype(&cpu::infer) infer;
  decltype(&cpu::backward) backward;
  decltype(&cpu::forward_into) forward_into;
};

// For a namespace-scope object of a register file.
struct RegisterDevice {
  RegisterDevice(c10::DeviceType device, const DeviceOperations& operations);
};

// Null if there are no kernels for the device.
const DeviceOperations* operations_on(c10::DeviceType device);

// Their names, as torch spells them.
std::vector<std::string> device_names();

// Null, or why tensors of the device cannot go to kernels.
const char* device_obstacle(c10::DeviceType device);

// On the device of the input. Raise RuntimeError if there are no kernels for it.
std::tuple<at::Tensor, Tensors> forward(const Stack& stack, const at::Tensor& input, at::TensorList parameters);
at::Tensor infer(const Stack& stack, const at::Tensor& input, at::TensorList parameters);
// Into memory of the caller, row-major without gaps. Nothing is checked but the device.
void infer_into(const Stack& stack, const at::Tensor& input, at::TensorList parameters, const at::Tensor& output);
Tensors backward(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                 at::TensorList parameters, const std::vector<bool>& needs);

}  // namespace fastmlp

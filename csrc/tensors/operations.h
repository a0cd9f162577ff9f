// What every device does alike around its kernels: checks arguments, allocates results, fills the structs of problem.h,
// and gives the forms that the dispatcher calls. Must not compute: the device's `run` does. A device's register file
// instantiates it with
//   struct Device {
//     static constexpr const char* name;                                       // "CPU", for errors
//     static constexpr c10::DispatchKey backend, autograd, autocast;           // of its tensors
//     static at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like);  // row-major, not initialised
//     static void run(const ForwardPass& pass, const at::Tensor& input);       // input is on the device
//     static void run(const BackwardPass& pass, const at::Tensor& input);
//     // Of a device that computes dropout, too: what torch.nn.Dropout would draw now, 1 where an element is kept.
//     static at::Tensor mask(at::IntArrayRef sizes, double dropped);
//   };
#pragma once

#include <ATen/core/List.h>

#include "checks.h"
#include "devices.h"
#include "passes.h"

namespace fastmlp {

template <class Device> struct Operations {
  static constexpr bool drops = requires { Device::mask({}, 0.0); };

  // What they make of the device's entry in the table of devices.h.
  static DeviceOperations entry() {
    DeviceOperations all;
    all.forward = &forward;
    all.infer = &infer;
    all.backward = &backward;
    all.forward_into = &forward_into;
    all.backward_into = &backward_into;
    all.empty = &Device::empty;
    all.drops = drops;
    all.plain_keys = c10::DispatchKeySet({Device::backend, Device::autograd, c10::DispatchKey::ADInplaceOrView}) |
                     c10::autocast_dispatch_keyset;
    all.autocast = Device::autocast;
    return all;
  }

  static void forward_into(const Stack& stack, const at::Tensor& input, at::TensorList parameters,
                           const at::Tensor& output, at::TensorList hidden) {
    Device::run(forward_pass(Device::name, stack, input, parameters, output, hidden).pass, input);
  }

  static std::tuple<at::Tensor, Tensors> forward(const Stack& stack, const at::Tensor& input,
                                                 at::TensorList parameters) {
    check_forward(stack, input, parameters);
    Tensors hidden = masks_of(stack, input, parameters);
    hidden.reserve(stack.hidden());
    for (size_t l = 0; hidden.size() < stack.hidden(); l++)
      hidden.push_back(result(input, parameters[stack.weight(l)]));
    at::Tensor output = result(input, parameters[stack.weight(stack.layers() - 1)]);
    forward_into(stack, input, parameters, output, hidden);
    return {output, hidden};
  }

  static at::Tensor infer(const Stack& stack, const at::Tensor& input, at::TensorList parameters) {
    check_forward(stack, input, parameters);
    at::Tensor output = result(input, parameters[stack.weight(stack.layers() - 1)]);
    forward_into(stack, input, parameters, output, masks_of(stack, input, parameters));
    return output;
  }

  static void backward_into(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                            at::TensorList parameters, at::TensorList grads) {
    Device::run(backward_pass(Device::name, stack, grad, input, saved, parameters, grads).pass, input);
  }

  static Tensors backward(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                          at::TensorList parameters, const std::vector<bool>& needs) {
    check_backward(stack, grad, input, saved, parameters, needs);
    Tensors grads(1 + parameters.size());
    for (size_t i = 0; i < grads.size(); i++) {
      if (needs[i]) grads[i] = Device::empty((i == 0 ? input : parameters[i - 1]).sizes(), input);
    }
    backward_into(stack, grad, input, saved, parameters, grads);
    return grads;
  }

  static std::tuple<at::Tensor, Tensors> forward_op(const at::Tensor& input, at::TensorList parameters,
                                                    const c10::List<bool>& has_bias, at::IntArrayRef activations,
                                                    at::ArrayRef<double> scalars) {
    return forward(Stack(has_bias.vec(), activations, scalars), input, parameters);
  }

  static at::Tensor infer_op(const at::Tensor& input, at::TensorList parameters, const c10::List<bool>& has_bias,
                             at::IntArrayRef activations, at::ArrayRef<double> scalars) {
    return infer(Stack(has_bias.vec(), activations, scalars), input, parameters);
  }

  static Tensors backward_op(const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                             at::TensorList parameters, const c10::List<bool>& has_bias, at::IntArrayRef activations,
                             at::ArrayRef<double> scalars, const c10::List<bool>& needs) {
    const std::vector<bool> needed(needs.begin(), needs.end());
    Tensors all = backward(Stack(has_bias.vec(), activations, scalars), grad, input, saved, parameters, needed);
    Tensors grads;
    for (size_t i = 0; i < all.size(); i++) {
      if (needed[i]) grads.push_back(std::move(all[i]));
    }
    return grads;
  }

 private:
  // In the order in which the layers draw.
  static Tensors masks_of(const Stack& stack, const at::Tensor& input, at::TensorList parameters) {
    Tensors masks;
    if (stack.masks() == 0) return masks;
    TORCH_CHECK(layers_drop(input.device().type(), input.scalar_type()), "fastmlp: layers do not drop on ",
                input.device(), " in ", input.scalar_type());
    if constexpr (drops) {
      for (size_t l = 0; masks.size() < stack.masks(); l++) {
        if (!stack.drops(l)) continue;
        masks.push_back(Device::mask(sizes_with(input, parameters[stack.weight(l)].size(0)), stack.specs()[l].dropout));
      }
    }
    return masks;
  }

  // A layer's output.
  static at::Tensor result(const at::Tensor& input, const at::Tensor& weight) {
    return Device::empty(sizes_with(input, weight.size(0)), input);
  }
};

}  // namespace fastmlp

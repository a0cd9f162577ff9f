// The table of devices: what each one can do, and what it says of itself. A register file (cpu/register.cpp,
// cuda/register.cpp) enters its device when the library is loaded. Route, autograd, training, optimizers, frozen
// networks and Python ask the table, so that none of them names a device: whoever adds one writes its register file.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/DispatchKeySet.h>

#include <string>
#include <utility>
#include <vector>

#include "../contract/instruction_sets.h"
#include "frozen_network.h"
#include "operators.h"

namespace fastmlp {

// An entry is null where the device lacks the operation: then PyTorch's own operations do it, or an error names the
// devices that have it.
struct DeviceOperations {
  operation::Forward* forward = nullptr;
  operation::Infer* infer = nullptr;
  operation::Backward* backward = nullptr;
  operation::ForwardInto* forward_into = nullptr;
  operation::BackwardInto* backward_into = nullptr;
  operation::Empty* empty = nullptr;
  operation::TrainInto* train_into = nullptr;
  operation::UpdateAll* update = nullptr;
  operation::GradientNorm* gradient_norm = nullptr;
  operation::ScaleGradients* scale_gradients = nullptr;
  operation::ClampGradients* clamp_gradients = nullptr;
  operation::Derivatives* derivatives = nullptr;
  operation::DerivativesGradient* derivatives_backward = nullptr;
  operation::Multiply* multiply = nullptr;
  operation::PlanElementwise* elementwise = nullptr;
  Freeze* freeze = nullptr;
  operation::Bernoulli* bernoulli = nullptr;
  operation::DrawsAsTorch* draws_as_torch = nullptr;
  operation::LayerNorm* layer_norm = nullptr;
  operation::LayerNormBackward* layer_norm_backward = nullptr;
  operation::BatchNorm* batch_norm = nullptr;
  operation::BatchNormBackward* batch_norm_backward = nullptr;
  operation::Softmax* softmax = nullptr;
  operation::SoftmaxBackward* softmax_backward = nullptr;
  operation::SoftmaxColumns* softmax_columns = nullptr;
  operation::Gather* gather = nullptr;
  operation::Scatter* scatter = nullptr;
  operation::RowMax* row_max = nullptr;
  operation::TakeRows* take_rows = nullptr;
  operation::AddRows* add_rows = nullptr;
  operation::Nll* nll = nullptr;
  operation::NllBackward* nll_backward = nullptr;

  // Whether forward and backward take layers that drop, in the dtypes that layers_drop names.
  bool drops = false;

  // The keys that a tensor of the device has if nothing stands between it and its data, and that of its autocast.
  c10::DispatchKeySet plain_keys;
  c10::DispatchKey autocast = c10::DispatchKey::Undefined;

  // Null, or why the kernels cannot run on this device of the type, as on a card that the build has no code for. Asked
  // once of each device. Null itself where they run on every one.
  const char* (*obstacle)(c10::DeviceIndex device) = nullptr;
  // Null if the device offers no choice.
  const InstructionSets* instruction_sets = nullptr;
};

// For namespace-scope objects of a register file.
struct RegisterDevice {
  RegisterDevice(c10::DeviceType device, const DeviceOperations& operations);
};
// For a device that the sources have and this build lacks: `hint` says how to build it.
struct RegisterAbsentDevice {
  RegisterAbsentDevice(c10::DeviceType device, const char* hint);
};

// Where the host reads and writes numbers, such as an optimizer's counters.
extern const c10::Device host;

// Null if there are no kernels for the device.
const DeviceOperations* operations_on(c10::DeviceType device);
// Raises RuntimeError if there are none for the device of a tensor, which is the input of a network.
const DeviceOperations& operations_for(const at::Tensor& input);

// Null, or why tensors of the device cannot go to kernels. Without an index: of no device of the type.
const char* device_obstacle(c10::Device device);

// Questions to ask of a device: whether it can do all of a training step, whether it has kernels for derivatives along
// the input, and whether it has a form of its own for the weights of frozen networks. False where there are no kernels.
bool trains(c10::DeviceType device);
bool derives(c10::DeviceType device);
bool packs(c10::DeviceType device);
// Whether layers of a run may drop, of this dtype.
bool layers_drop(c10::DeviceType device, at::ScalarType dtype);
bool has_kernels(c10::DeviceType device);
// The devices of which one of them is true, by name as torch spells it: {"cpu"}; and for errors: "the CPU".
std::vector<std::string> device_names(bool (*is_true)(c10::DeviceType));
std::string devices_in_words(bool (*is_true)(c10::DeviceType));
// The devices that this build lacks, and how to build each.
std::vector<std::pair<std::string, std::string>> absent_devices();

// The operations of the device that the input is on. Raise RuntimeError if there are no kernels for it.
std::tuple<at::Tensor, Tensors> forward(const Stack& stack, const at::Tensor& input, at::TensorList parameters);
at::Tensor infer(const Stack& stack, const at::Tensor& input, at::TensorList parameters);
Tensors backward(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                 at::TensorList parameters, const std::vector<bool>& needs);
void forward_into(const Stack& stack, const at::Tensor& input, at::TensorList parameters, const at::Tensor& output,
                  at::TensorList hidden);
void backward_into(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                   at::TensorList parameters, at::TensorList grads);

}  // namespace fastmlp

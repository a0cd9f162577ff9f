// The only file of the CPU device that knows torch: allocates results, takes the number of threads from torch, and
// registers the operators for the dispatcher. What it shares with other devices is in operations.h.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../tensors/devices.h"
#include "../tensors/operations.h"
#include "network.h"
#include "step.h"
#include "workspace.h"

namespace fastmlp::cpu {
namespace {

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

struct Device {
  static constexpr const char* name = "CPU";

  static at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like) {
    // Past the dispatcher, which would find the same.
    at::Tensor tensor = at::detail::empty_cpu(sizes, like.scalar_type());
    prefer_huge_pages(tensor.data_ptr(), tensor.nbytes());
    return tensor;
  }

  static void run(const ForwardPass& pass, const at::Tensor&) { cpu::forward(pass, threads()); }
  static void run(const BackwardPass& pass, const at::Tensor&) { cpu::backward(pass, threads()); }
};

using Cpu = Operations<Device>;

}  // namespace

void forward_into(const Stack& stack, const at::Tensor& input, at::TensorList parameters, const at::Tensor& output,
                  at::TensorList hidden) {
  Cpu::forward_into(stack, input, parameters, output, hidden);
}

std::tuple<at::Tensor, Tensors> forward(const Stack& stack, const at::Tensor& input, at::TensorList parameters) {
  return Cpu::forward(stack, input, parameters);
}

at::Tensor infer(const Stack& stack, const at::Tensor& input, at::TensorList parameters) {
  return Cpu::infer(stack, input, parameters);
}

void backward_into(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                   at::TensorList parameters, at::TensorList grads) {
  Cpu::backward_into(stack, grad, input, saved, parameters, grads);
}

Tensors backward(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                 at::TensorList parameters, const std::vector<bool>& needs) {
  return Cpu::backward(stack, grad, input, saved, parameters, needs);
}

at::Tensor uninitialised(at::IntArrayRef sizes, const at::Tensor& like) { return Device::empty(sizes, like); }

double train_into(const Stack& stack, const at::Tensor& input, at::TensorList parameters, const LossSpec& spec,
                  const at::Tensor& target, const at::Tensor& weight, at::TensorList grads, at::Tensor& memory) {
  const StepTensors tensors = step_pass(Device::name, stack, input, parameters, spec, target, weight, grads);
  const int64_t bytes = int64_t(train_bytes(tensors.pass));
  if (bytes > 0 && (!memory.defined() || memory.numel() < bytes)) {
    memory = at::detail::empty_cpu({bytes}, at::kByte);
    prefer_huge_pages(memory.data_ptr(), memory.nbytes());
  }
  return train(tensors.pass, bytes > 0 ? memory.data_ptr() : nullptr, threads());
}

void update(const std::vector<Update>& updates) { update(updates, threads()); }

static const RegisterDevice registered(c10::kCPU, {&forward, &infer, &backward, &forward_into});

TORCH_LIBRARY_IMPL(fastmlp, CPU, m) {
  m.impl("forward", &Cpu::forward_op);
  m.impl("infer", &Cpu::infer_op);
  m.impl("backward", &Cpu::backward_op);
}

}  // namespace fastmlp::cpu

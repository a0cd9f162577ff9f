// The table behind devices.h.
#include "devices.h"

#include <array>
#include <atomic>
#include <limits>
#include <optional>

namespace fastmlp {
namespace {

struct Entry {
  std::optional<DeviceOperations> operations;
  // What was asked of each device of the type: null before, then why not, or an empty text.
  std::array<std::atomic<const char*>, size_t(std::numeric_limits<c10::DeviceIndex>::max()) + 1> obstacles{};
};

using Table = std::array<Entry, size_t(c10::COMPILE_TIME_MAX_DEVICE_TYPES)>;

// Made by the first register file that is initialised.
Table& table() {
  static Table devices;
  return devices;
}

const DeviceOperations& operations_of(const at::Tensor& input) {
  const c10::DeviceType device = input.device().type();
  const DeviceOperations* const operations = operations_on(device);
  TORCH_CHECK(operations, "fastmlp: input is on ", input.device(), ", and ", device_obstacle(input.device()));
  return *operations;
}

}  // namespace

RegisterDevice::RegisterDevice(c10::DeviceType device, const DeviceOperations& operations) {
  table()[size_t(device)].operations = operations;
}

const DeviceOperations* operations_on(c10::DeviceType device) {
  const auto& operations = table()[size_t(device)].operations;
  return operations ? &*operations : nullptr;
}

std::vector<std::string> device_names() {
  std::vector<std::string> names;
  for (size_t i = 0; i < table().size(); i++) {
    if (table()[i].operations) names.push_back(c10::DeviceTypeName(c10::DeviceType(i), true));
  }
  return names;
}

const char* device_obstacle(c10::Device device) {
  if (const DeviceOperations* const operations = operations_on(device.type())) {
    if (!operations->obstacle || !device.has_index()) return nullptr;
    std::atomic<const char*>& kept = table()[size_t(device.type())].obstacles[size_t(device.index())];
    const char* why = kept.load();
    if (!why) {
      // Several threads may ask at once; they get the same answer.
      why = operations->obstacle(device.index());
      if (!why) why = "";
      kept.store(why);
    }
    return *why ? why : nullptr;
  }
  if (device.is_cuda())
    return "this build has no CUDA kernels; in the source tree, FASTMLP_CUDA=1 pip install --no-build-isolation "
           "--force-reinstall --no-deps . builds them";
  return "there are no kernels for the device";
}

std::tuple<at::Tensor, Tensors> forward(const Stack& stack, const at::Tensor& input, at::TensorList parameters) {
  return operations_of(input).forward(stack, input, parameters);
}

at::Tensor infer(const Stack& stack, const at::Tensor& input, at::TensorList parameters) {
  return operations_of(input).infer(stack, input, parameters);
}

void infer_into(const Stack& stack, const at::Tensor& input, at::TensorList parameters, const at::Tensor& output) {
  operations_of(input).forward_into(stack, input, parameters, output, {});
}

Tensors backward(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                 at::TensorList parameters, const std::vector<bool>& needs) {
  return operations_of(input).backward(stack, grad, input, saved, parameters, needs);
}

}  // namespace fastmlp

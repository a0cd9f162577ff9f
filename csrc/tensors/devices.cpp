// The table behind devices.h, indexed by the type of a device. Asked at every call, so a question must cost no more
// than an indexed load. Holds only what register files enter: the one device named here is the host.
#include "devices.h"

#include <array>
#include <atomic>
#include <limits>

namespace fastmlp {
namespace {

struct Entry {
  bool has_kernels = false;
  DeviceOperations operations;
  const char* hint = nullptr;
  // What was asked of each device of the type: null before, then why not, or an empty text.
  std::array<std::atomic<const char*>, size_t(std::numeric_limits<c10::DeviceIndex>::max()) + 1> obstacles{};
};

// Complete before any register file runs, because it is initialised at compile time.
constinit std::array<Entry, size_t(c10::COMPILE_TIME_MAX_DEVICE_TYPES)> table{};

Entry& entry_of(c10::DeviceType device) { return table[size_t(device)]; }

}  // namespace

RegisterDevice::RegisterDevice(c10::DeviceType device, const DeviceOperations& operations) {
  Entry& entry = entry_of(device);
  entry.has_kernels = true;
  entry.operations = operations;
}

RegisterAbsentDevice::RegisterAbsentDevice(c10::DeviceType device, const char* hint) { entry_of(device).hint = hint; }

const c10::Device host{c10::DeviceType::CPU};

const DeviceOperations* operations_on(c10::DeviceType device) {
  const Entry& entry = entry_of(device);
  return entry.has_kernels ? &entry.operations : nullptr;
}

const DeviceOperations& operations_for(const at::Tensor& input) {
  const DeviceOperations* const operations = operations_on(input.device().type());
  TORCH_CHECK(operations, "fastmlp: input is on ", input.device(), ", and ", device_obstacle(input.device()));
  return *operations;
}

const char* device_obstacle(c10::Device device) {
  Entry& entry = entry_of(device.type());
  if (!entry.has_kernels) return entry.hint ? entry.hint : "there are no kernels for the device";
  if (!entry.operations.obstacle || !device.has_index()) return nullptr;
  std::atomic<const char*>& kept = entry.obstacles[size_t(device.index())];
  const char* why = kept.load();
  if (!why) {
    // Several threads may ask at once; they get the same answer.
    why = entry.operations.obstacle(device.index());
    if (!why) why = "";
    kept.store(why);
  }
  return *why ? why : nullptr;
}

bool has_kernels(c10::DeviceType device) { return entry_of(device).has_kernels; }

bool trains(c10::DeviceType device) {
  const DeviceOperations& operations = entry_of(device).operations;
  return operations.train_into && operations.update;
}

bool derives(c10::DeviceType device) {
  const DeviceOperations& operations = entry_of(device).operations;
  return operations.derivatives && operations.derivatives_backward;
}

bool packs(c10::DeviceType device) { return entry_of(device).operations.freeze; }

bool layers_drop(c10::DeviceType device, at::ScalarType dtype) {
  return entry_of(device).operations.drops && (dtype == at::kFloat || dtype == at::kDouble);
}

std::vector<std::string> device_names(bool (*is_true)(c10::DeviceType)) {
  std::vector<std::string> names;
  for (size_t i = 0; i < table.size(); i++) {
    if (is_true(c10::DeviceType(i))) names.push_back(c10::DeviceTypeName(c10::DeviceType(i), true));
  }
  return names;
}

std::string devices_in_words(bool (*is_true)(c10::DeviceType)) {
  std::string words;
  for (size_t i = 0; i < table.size(); i++) {
    if (!is_true(c10::DeviceType(i))) continue;
    words += (words.empty() ? "the " : " or the ") + c10::DeviceTypeName(c10::DeviceType(i));
  }
  return words;
}

std::vector<std::pair<std::string, std::string>> absent_devices() {
  std::vector<std::pair<std::string, std::string>> absent;
  for (size_t i = 0; i < table.size(); i++) {
    if (table[i].hint) absent.emplace_back(c10::DeviceTypeName(c10::DeviceType(i), true), table[i].hint);
  }
  return absent;
}

std::tuple<at::Tensor, Tensors> forward(const Stack& stack, const at::Tensor& input, at::TensorList parameters) {
  return operations_for(input).forward(stack, input, parameters);
}

at::Tensor infer(const Stack& stack, const at::Tensor& input, at::TensorList parameters) {
  return operations_for(input).infer(stack, input, parameters);
}

Tensors backward(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                 at::TensorList parameters, const std::vector<bool>& needs) {
  return operations_for(input).backward(stack, grad, input, saved, parameters, needs);
}

void forward_into(const Stack& stack, const at::Tensor& input, at::TensorList parameters, const at::Tensor& output,
                  at::TensorList hidden) {
  operations_for(input).forward_into(stack, input, parameters, output, hidden);
}

void backward_into(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                   at::TensorList parameters, at::TensorList grads) {
  operations_for(input).backward_into(stack, grad, input, saved, parameters, grads);
}

}  // namespace fastmlp

// What one call of a frozen network works with, whatever kind its input is of: frozen.cpp takes the call apart and
// hands it to frozen_tensor.cpp or frozen_array.cpp, and frozen_load.cpp fills the network. Everything here needs the
// GIL, and nothing here checks dtypes or devices.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <memory>
#include <string>

#include "../cpu/frozen.h"
#include "../tensors/frozen_device.h"
#include "frozen_watch.h"

namespace fastmlp::frozen {

// One of the two networks, or none yet, and the watch of the model that was begun before the network was read from it.
// They are replaced together and under the GIL: however many threads read the model at once, a network never stands
// beside a watch that saw the model later.
struct State {
  std::shared_ptr<const cpu::FrozenNetwork> network;
  std::shared_ptr<DeviceNetwork> on_device;
  bool matrices_only = false;    // inputs must have two dimensions
  std::shared_ptr<Watch> watch;  // null if there is no model to follow
};

// Raises TypeError for an object that is no FrozenMLP.
State& state_of(PyObject* self);
// Raises RuntimeError if there is no network.
void check_filled(const State& state);
// Brings the network up to what its model and the instruction set are now; may run code of Python.
void follow(PyObject* self, State& state);

// Another thread may replace the network during a call, which goes on with the one that it began with.
struct Call {
  std::shared_ptr<const cpu::FrozenNetwork> network;
  std::shared_ptr<const DeviceNetwork> on_device;
  bool matrices_only;
  at::Device device = at::kCPU;
  at::ScalarType dtype;  // of input and output
  int64_t in_features, out_features;

  explicit Call(const State& state);
  int64_t element() const { return int64_t(c10::elementSize(dtype)); }
};

constexpr int most_dimensions = 64;

// An input as both kinds have it: steps in bytes.
struct View {
  const char* data = nullptr;
  int dims = 0;
  int64_t sizes[most_dimensions], steps[most_dimensions];

  c10::IntArrayRef shape() const { return {sizes, size_t(dims)}; }
  cpu::InputRows rows() const { return {data, dims - 1, sizes, steps, steps[dims - 1]}; }
};

void check_dimensions(int64_t dimensions);
void check_shape(const Call& call, const View& x);
// Raises if `out_bytes` at `out` may share memory with the elements of x.
void check_apart(const View& x, const char* out, int64_t out_bytes, int64_t element);
// The shape of the output of x.
View result_of(const Call& call, const View& x);

// What to do about an argument of another dtype: `convert` is the call that gives it the network's.
std::string dtype_remedy(const Call& call, at::ScalarType given, const std::string& convert);

// Computes on the CPU; `output` has rows without gaps.
void run(const Call& call, const cpu::InputRows& input, void* output);

// Inputs and outs of the two kinds; `out` may be null. A new reference.
PyObject* call_tensor(const Call& call, PyObject* input, PyObject* out);
PyObject* call_array(const Call& call, PyObject* input, PyObject* out);
bool is_array(PyObject* object);

// Adds the functions that fill a network and read it.
void add_loading(py::module_& module);

}  // namespace fastmlp::frozen

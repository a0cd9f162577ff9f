// Fills frozen networks with layers and reads them again, for fastmlp/frozen.py, rarely. What a network is made of is
// checked here before memory is taken for it; it is packed and put in place without letting other threads in between.
#include <ATen/ATen.h>

#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "../tensors/checks.h"
#include "frozen_call.h"
#include "../tensors/passes.h"
#include "../tensors/stack.h"

namespace fastmlp::frozen {
namespace {

using Biases = std::vector<std::optional<at::Tensor>>;

// No network has as many, and products of these and the sizes of blocks do not overflow.
constexpr int64_t most_features = std::numeric_limits<int32_t>::max(), most_elements = int64_t(1) << 48;

std::vector<bool> has_bias(const Biases& biases) {
  std::vector<bool> all;
  for (const auto& bias : biases) all.push_back(bias.has_value());
  return all;
}

void check_tensor(const char* list, size_t l, const at::Tensor& tensor, const at::Tensor& first, at::ScalarType dtype) {
  TORCH_CHECK(tensor.defined(), "fastmlp: ", list, '[', l, "] is an undefined tensor");
  TORCH_CHECK(
      tensor.layout() == at::kStrided && tensor.has_storage() && !tensor.key_set().has(c10::DispatchKey::Python),
      "fastmlp: ", list, '[', l, "] is not a plain tensor with memory of its own");
  TORCH_CHECK(tensor.device() == first.device(), "fastmlp: ", list, '[', l, "] is on ", tensor.device(), ", expected ",
              first.device(), ", where weights[0] is");
  TORCH_CHECK(tensor.scalar_type() == dtype, "fastmlp: ", list, '[', l, "] has dtype ",
              dtype_name(tensor.scalar_type()), ", expected ", dtype_name(dtype));
}

// `bias_dtype`: what biases must be.
void check_layers(const Stack& stack, const Tensors& weights, const Biases& biases, at::ScalarType bias_dtype) {
  TORCH_CHECK_VALUE(weights.size() == stack.layers(), "fastmlp: expected a weight for each of ", stack.layers(),
                    " layers, got ", weights.size());
  const at::Tensor& first = weights.front();
  for (size_t l = 0; l < weights.size(); l++) {
    const at::Tensor& weight = weights[l];
    check_tensor("weights", l, weight, first, first.scalar_type());
    TORCH_CHECK(weight.dim() == 2, "fastmlp: weights[", l, "] has shape ", weight.sizes(),
                ", expected two dimensions, (out_features, in_features)");
    const int64_t n = weight.size(0), k = weight.size(1);
    TORCH_CHECK(l == 0 || k == weights[l - 1].size(0), "fastmlp: weights[", l, "] has shape ", weight.sizes(),
                ", expected ", weights[l - 1].size(0), " in the last dimension, the out_features of the layer before");
    TORCH_CHECK(n <= most_features && k <= most_features && n * k <= most_elements, "fastmlp: weights[", l,
                "] has shape ", weight.sizes(), ", which is more than a frozen network can hold");
    if (!biases[l]) continue;
    check_tensor("biases", l, *biases[l], first, bias_dtype);
    TORCH_CHECK(biases[l]->dim() == 1 && biases[l]->size(0) == n, "fastmlp: biases[", l, "] has shape ",
                biases[l]->sizes(), ", expected [", n, "], the out_features of weights[", l, "]");
  }
}

at::ScalarType dtype_of_weights(const Tensors& weights) {
  TORCH_CHECK_VALUE(!weights.empty() && weights.front().defined(), "fastmlp: a network needs at least one weight");
  const at::ScalarType dtype = weights.front().scalar_type();
  TORCH_CHECK(dtype_of(dtype), "fastmlp: weights have dtype ", dtype_name(dtype),
              ", expected torch.float32, torch.float64, torch.bfloat16 or torch.float16");
  return dtype;
}

at::ScalarType dtype_of_sums(at::ScalarType dtype) { return c10::elementSize(dtype) == 2 ? at::kFloat : dtype; }

// Packs the layers for the CPU. `watch` is null if there is no model to follow.
void load(const py::handle& self, const std::shared_ptr<Watch>& watch, const Tensors& weights, const Biases& biases,
          const std::vector<int64_t>& kinds, const std::vector<double>& scalars, bool float32_ends,
          bool matrices_only) {
  State& state = state_of(self.ptr());
  const Stack stack(has_bias(biases), kinds, scalars);
  const at::ScalarType dtype = dtype_of_weights(weights);
  check_layers(stack, weights, biases, dtype_of_sums(dtype));
  TORCH_CHECK(weights.front().is_cpu(), "fastmlp: weights[0] is on ", weights.front().device(), ", expected the CPU");
  TORCH_CHECK_VALUE(!float32_ends || dtype == at::kBFloat16,
                    "fastmlp: input and output are float32 with weights in torch.bfloat16 only, got ",
                    dtype_name(dtype));
  Network network;
  network.dtype = *dtype_of(dtype);
  for (size_t l = 0; l < weights.size(); l++) {
    const at::Tensor& weight = weights[l];
    Layer& layer = network.layers.emplace_back();
    layer.in_features = weight.size(1);
    layer.out_features = weight.size(0);
    layer.weight = {weight.data_ptr(), weight.stride(0), weight.stride(1)};
    layer.activation = stack.activation(l);
    if (biases[l]) layer.bias = {biases[l]->data_ptr(), biases[l]->stride(0)};
  }
  state.network = cpu::FrozenNetwork::pack(cpu::active(), network, float32_ends);
  state.on_device.reset();
  state.matrices_only = matrices_only;
  state.watch = watch;
}

// The same for another device than the CPU, with biases of the weights' dtype.
void load_on_device(const py::handle& self, const std::shared_ptr<Watch>& watch, const Tensors& weights,
                    const Biases& biases, const std::vector<int64_t>& kinds, const std::vector<double>& scalars,
                    bool matrices_only) {
  State& state = state_of(self.ptr());
  const Stack stack(has_bias(biases), kinds, scalars);
  check_layers(stack, weights, biases, dtype_of_weights(weights));
  Tensors parameters;
  for (size_t l = 0; l < weights.size(); l++) {
    parameters.push_back(weights[l]);
    if (biases[l]) parameters.push_back(*biases[l]);
  }
  if (!state.on_device || !state.on_device->refill(stack, parameters))
    state.on_device = std::make_shared<DeviceNetwork>(stack, parameters);
  state.network.reset();
  state.matrices_only = matrices_only;
  state.watch = watch;
}

// What the two forms of a network have in common.
struct Description {
  std::vector<int64_t> sizes, kinds;
  std::vector<double> scalars;

  void add(int64_t in_features, int64_t out_features, const ActivationSpec& activation) {
    if (sizes.empty()) sizes.push_back(in_features);
    sizes.push_back(out_features);
    kinds.push_back(activation.kind);
    scalars.insert(scalars.end(), {activation.scalars.a, activation.scalars.b});
  }

  explicit Description(const State& state) {
    if (state.on_device) {
      const Stack& stack = state.on_device->stack();
      for (size_t l = 0; l < stack.layers(); l++) {
        const at::Tensor& weight = state.on_device->parameters()[stack.weight(l)];
        add(weight.size(1), weight.size(0), stack.activation(l));
      }
    } else {
      for (const cpu::FrozenLayer& layer : state.network->layers()) {
        add(layer.in_features, layer.out_features, layer.activation);
      }
    }
  }
};

// Up to date with the model, as a call is. Without a network there is nothing to follow, or to read.
const State& followed(const py::handle& self) {
  State& state = state_of(self.ptr());
  check_filled(state);
  follow(self.ptr(), state);
  return state;
}

// Sizes, kinds and scalars of activations, dtype of weights, whether input and output are float32, device, and bytes.
py::tuple describe(const py::handle& self) {
  const State& state = followed(self);
  const Description all(state);
  const bool on_device = bool(state.on_device);
  const at::ScalarType dtype = on_device ? state.on_device->dtype() : scalar_type_of(state.network->dtype());
  return py::make_tuple(all.sizes, all.kinds, all.scalars, dtype_name(dtype),
                        !on_device && state.network->float32_ends(),
                        on_device ? state.on_device->device().str() : "cpu",
                        on_device ? state.on_device->bytes() : state.network->bytes());
}

// What load takes, of one moment; tensors of a device are its own and not copies.
py::tuple unload(const py::handle& self) {
  const State& state = followed(self);
  const Description all(state);
  Tensors weights;
  Biases biases;
  if (state.on_device) {
    const Stack& stack = state.on_device->stack();
    const Tensors& parameters = state.on_device->parameters();
    for (size_t l = 0; l < stack.layers(); l++) {
      weights.push_back(parameters[stack.weight(l)]);
      biases.push_back(stack.has_bias(l) ? std::optional(parameters[stack.bias(l)]) : std::nullopt);
    }
    return py::make_tuple(weights, biases, all.kinds, all.scalars, false, state.matrices_only);
  }
  const cpu::FrozenNetwork& network = *state.network;
  const at::ScalarType dtype = scalar_type_of(network.dtype());
  for (size_t l = 0; l < network.layers().size(); l++) {
    const cpu::FrozenLayer& layer = network.layers()[l];
    weights.push_back(at::empty({layer.out_features, layer.in_features}, dtype));
    biases.emplace_back();
    if (layer.has_bias) biases.back() = at::empty({layer.out_features}, dtype_of_sums(dtype));
    network.unpack(l, weights.back().data_ptr(), layer.has_bias ? biases.back()->data_ptr() : nullptr);
  }
  return py::make_tuple(weights, biases, all.kinds, all.scalars, network.float32_ends(), state.matrices_only);
}

}  // namespace

// Functions of the module and not methods: only calls have to be fast.
void add_loading(py::module_& module) {
  py::class_<Watch, std::shared_ptr<Watch>>(module, "Watch")
      .def(py::init<const py::list&>())
      .def("read", &Watch::read)
      .def_readwrite("plan", &Watch::plan);
  module.def("load_frozen", &load);
  module.def("load_frozen_on_device", &load_on_device);
  module.def("unload_frozen", &unload);
  module.def("describe_frozen", &describe);
}

}  // namespace fastmlp::frozen

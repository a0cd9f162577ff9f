// Fills frozen networks with layers and reads them again, for fastmlp/frozen.py, rarely. What a network is made of is
// checked here before memory is taken for it; it is made, by the operations of its device, and put in place without
// letting other threads in between. Must name no device.
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../tensors/devices.h"
#include "../tensors/dtypes.h"
#include "../tensors/frozen_device.h"
#include "../tensors/stack.h"
#include "frozen_call.h"

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

constexpr const char* head_names[] = {"none", "softmax", "log_softmax"};

// What a call of a chain does to shapes, and what follows the last layer, as Python has it.
struct Ends {
  bool matrices_only, flattens;
  Head head;
  std::shared_ptr<const Reshapings> reshapings;

  Ends(bool matrices_only, bool flattens, const std::string& name, const std::vector<Reshaping::Call>& calls)
      : matrices_only(matrices_only), flattens(flattens) {
    const auto found = std::find(std::begin(head_names), std::end(head_names), name);
    TORCH_CHECK_VALUE(found != std::end(head_names), "fastmlp: a network ends with none, softmax or log_softmax, got ",
                      name);
    head = Head(found - std::begin(head_names));
    if (!calls.empty()) reshapings = std::make_shared<const Reshapings>(calls.begin(), calls.end());
  }
  // To a network that is in place, instead of what was there.
  void give(State& state) const {
    state.graph.reset();
    state.matrices_only = matrices_only;
    state.flattens = flattens;
    state.reshapings = reshapings;
  }
};

// Puts a network in place, and the watch of the model that it was read from, null if there is none to follow.
void load(const py::handle& self, const std::shared_ptr<Watch>& watch, const Tensors& weights, const Biases& biases,
          const std::vector<int64_t>& activations, const std::vector<double>& scalars, bool float32_ends,
          bool matrices_only, bool flattens, const std::string& head, const std::vector<Reshaping::Call>& reshapings) {
  const Ends ends(matrices_only, flattens, head, reshapings);
  State& state = state_of(self.ptr());
  state.network = network_of(weights, biases, activations, scalars, {float32_ends, ends.head});
  ends.give(state);
  state.watch = watch;
}

// The same as a copy of the weights, with biases of their dtype, for a device that has no other form.
void load_on_device(const py::handle& self, const std::shared_ptr<Watch>& watch, const Tensors& weights,
                    const Biases& biases, const std::vector<int64_t>& activations, const std::vector<double>& scalars,
                    bool matrices_only, bool flattens, const std::string& head,
                    const std::vector<Reshaping::Call>& reshapings) {
  const Ends ends(matrices_only, flattens, head, reshapings);
  State& state = state_of(self.ptr());
  const Stack stack(has_bias(biases), activations, scalars);
  check_layers(stack, weights, biases, dtype_of_weights(weights));
  const FrozenNetwork::Parameters parameters{weights, biases};
  if (!state.network || !state.network->refill(stack, parameters, ends.head))
    state.network = std::make_shared<DeviceNetwork>(stack, parameters, ends.head);
  ends.give(state);
  state.watch = watch;
}

void check_chain(const State& state) {
  TORCH_CHECK(state.network, "fastmlp: the model of the frozen network has just become a graph; call again");
}

std::vector<Reshaping::Call> calls_of(const State& state) {
  std::vector<Reshaping::Call> calls;
  if (!state.reshapings) return calls;
  for (const Reshaping& reshaping : *state.reshapings) calls.push_back(reshaping.call());
  return calls;
}

// Features, activations and their scalars, dtype of weights, whether input and output are float32, whether inputs are
// flattened, the name of the head, reshapings of the output, device, and bytes.
py::tuple describe(const py::handle& self) {
  const State& state = followed(self);
  check_chain(state);
  const std::shared_ptr<const FrozenNetwork> network = state.network;
  const FrozenNetwork::Form& form = network->form();
  const LayerLists lists(form.layers);
  return py::make_tuple(form.features, lists.activations, lists.scalars, dtype_name(form.dtype),
                        form.end_dtype != form.dtype, state.flattens, head_names[int(form.head)], calls_of(state),
                        form.device.str(), form.bytes);
}

// What load takes, of one moment; tensors of a device are its own and not copies.
py::tuple unload(const py::handle& self) {
  const State& state = followed(self);
  // Whatever modes and transforms the caller is in: weights are unpacked into ordinary memory.
  const c10::impl::ForceDispatchKeyGuard plain(c10::default_included_set, c10::default_excluded_set);
  check_chain(state);
  const std::shared_ptr<const FrozenNetwork> network = state.network;
  const bool matrices_only = state.matrices_only, flattens = state.flattens;
  const std::vector<Reshaping::Call> reshapings = calls_of(state);
  const FrozenNetwork::Form& form = network->form();
  const LayerLists lists(form.layers);
  const auto [weights, biases] = network->parameters();
  return py::make_tuple(weights, biases, lists.activations, lists.scalars, form.end_dtype != form.dtype, matrices_only,
                        flattens, head_names[int(form.head)], reshapings);
}

}  // namespace

std::shared_ptr<FrozenNetwork> network_of(const Tensors& weights, const Biases& biases,
                                          const std::vector<int64_t>& activations, const std::vector<double>& scalars,
                                          const FrozenEnds& ends) {
  const Stack stack(has_bias(biases), activations, scalars);
  const at::ScalarType dtype = dtype_of_weights(weights);
  check_layers(stack, weights, biases, c10::elementSize(dtype) == 2 ? at::kFloat : dtype);
  const c10::Device device = weights.front().device();
  TORCH_CHECK(packs(device.type()), "fastmlp: weights[0] is on ", device, ", expected ", devices_in_words(&packs));
  TORCH_CHECK_VALUE(!ends.float32 || dtype == at::kBFloat16,
                    "fastmlp: input and output are float32 with weights in torch.bfloat16 only, got ",
                    dtype_name(dtype));
  return operations_on(device.type())->freeze(stack, {weights, biases}, ends);
}

const State& followed(const py::handle& self) {
  State& state = state_of(self.ptr());
  check_filled(state);
  follow(self.ptr(), state);
  return state;
}

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

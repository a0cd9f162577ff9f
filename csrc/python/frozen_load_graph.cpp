// Fills frozen networks with graphs and reads them again, for fastmlp/frozen.py, rarely. Reads the description of a
// graph that Python has made; FrozenGraph checks it. Must name no device.
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../tensors/dtypes.h"
#include "frozen_call.h"

namespace fastmlp::frozen {
namespace {

using Tensors = std::vector<at::Tensor>;
using Biases = std::vector<std::optional<at::Tensor>>;
// Weights, biases, activations and their scalars.
using Layers = std::tuple<Tensors, Biases, std::vector<int64_t>, std::vector<double>>;
using PlaceTuple = std::tuple<int, int64_t, int64_t, int64_t, int64_t>;

GraphForm::Place place_of(const py::handle& given) {
  const auto [memory, offset, features, row_step, step] = given.cast<PlaceTuple>();
  return {memory, offset, features, row_step, step};
}

std::optional<GraphForm::Place> maybe_place(const py::handle& given) {
  if (given.is_none()) return std::nullopt;
  return place_of(given);
}

GraphForm::ElementStep element_step(const py::tuple& given) {
  GraphForm::ElementStep step;
  for (const py::handle input : given[1]) step.inputs.push_back(place_of(input));
  for (const py::handle one : given[2]) {
    auto [name, operands, scalars] = one.cast<std::tuple<std::string, std::vector<int>, std::vector<double>>>();
    step.instructions.push_back({std::move(name), std::move(operands), std::move(scalars)});
  }
  for (const py::handle one : given[3]) {
    const auto pair = one.cast<py::tuple>();
    step.outputs.emplace_back(place_of(pair[0]), pair[1].cast<int>());
  }
  return step;
}

GraphForm::Step step_of(const py::tuple& given) {
  const auto kind = given[0].cast<std::string>();
  if (kind == "network") return GraphForm::NetworkStep{given[1].cast<int>(), place_of(given[2]), place_of(given[3])};
  if (kind == "elementwise") return element_step(given);
  if (kind == "softmax") return GraphForm::SoftmaxStep{place_of(given[1]), place_of(given[2]), given[3].cast<bool>()};
  const bool is_norm = kind == "layer_norm";
  TORCH_CHECK_VALUE(is_norm, "fastmlp: a step of a frozen graph cannot be ", kind);
  return GraphForm::NormStep{place_of(given[1]), maybe_place(given[2]), maybe_place(given[3]), given[4].cast<double>(),
                             place_of(given[5]), place_of(given[6]),    place_of(given[7])};
}

GraphForm::Memory::Kind kind_of(const std::string& name) {
  if (name == "input") return GraphForm::Memory::input;
  if (name == "output") return GraphForm::Memory::output;
  if (name == "arena") return GraphForm::Memory::arena;
  const bool is_constant = name == "constant";
  TORCH_CHECK_VALUE(is_constant, "fastmlp: a memory of a frozen graph cannot be ", name);
  return GraphForm::Memory::constant;
}

// `recipe`: memories, each a kind and features; steps; and of each output whether it is squeezed. `constants`: of the
// memories that are constant, in their order.
GraphForm form_of(const py::tuple& recipe, const Tensors& constants) {
  GraphForm form;
  size_t next = 0;
  for (const py::handle one : recipe[0]) {
    const auto [kind, features] = one.cast<std::pair<std::string, int64_t>>();
    form.memories.push_back({kind_of(kind), features});
    if (kind != "constant") continue;
    TORCH_CHECK_VALUE(next < constants.size(), "fastmlp: a frozen graph has ", constants.size(),
                      " constants, expected more");
    form.memories.back().value = constants[next++];
  }
  for (const py::handle one : recipe[1]) form.steps.push_back(step_of(one.cast<py::tuple>()));
  form.squeezed = recipe[2].cast<std::vector<bool>>();
  return form;
}

// Puts a graph in place, and the watch of the model that it was read from, null if there is none to follow.
void load_graph(const py::handle& self, const std::shared_ptr<Watch>& watch, const std::vector<Layers>& networks,
                const py::tuple& recipe, const Tensors& constants, bool float32_ends, bool matrices_only) {
  State& state = state_of(self.ptr());
  std::vector<std::shared_ptr<FrozenNetwork>> packed;
  for (const auto& [weights, biases, activations, scalars] : networks)
    packed.push_back(network_of(weights, biases, activations, scalars, {float32_ends, Head::none}));
  state.graph = std::make_shared<FrozenGraph>(form_of(recipe, constants), std::move(packed));
  state.network.reset();
  state.recipe = recipe;
  state.matrices_only = matrices_only;
  state.flattens = false;
  state.reshapings.reset();
  state.watch = watch;
}

// What load_graph takes, of one moment; None for a chain.
py::object unload_graph(const py::handle& self) {
  const State& state = followed(self);
  // Whatever modes and transforms the caller is in: weights are unpacked into ordinary memory.
  const c10::impl::ForceDispatchKeyGuard plain(c10::default_included_set, c10::default_excluded_set);
  if (!state.graph) return py::none();
  const std::shared_ptr<const FrozenGraph> graph = state.graph;
  py::list networks;
  for (const auto& network : graph->networks()) {
    const LayerLists lists(network->form().layers);
    const auto [weights, biases] = network->parameters();
    networks.append(py::make_tuple(weights, biases, lists.activations, lists.scalars));
  }
  Tensors constants;
  for (const GraphForm::Memory& memory : graph->form().memories)
    if (memory.kind == GraphForm::Memory::constant) constants.push_back(memory.value);
  const FrozenNetwork::Form& form = graph->networks().front()->form();
  return py::make_tuple(networks, state.recipe, constants, form.end_dtype != form.dtype, state.matrices_only);
}

// Features of inputs and outputs, the number of networks, dtype of weights, whether input and output are float32, and
// bytes; None for a chain.
py::object describe_graph(const py::handle& self) {
  const State& state = followed(self);
  if (!state.graph) return py::none();
  const FrozenGraph& graph = *state.graph;
  const FrozenNetwork::Form& form = graph.networks().front()->form();
  return py::make_tuple(graph.inputs(), graph.outputs(), graph.networks().size(), dtype_name(form.dtype),
                        form.end_dtype != form.dtype, graph.bytes());
}

}  // namespace

void add_loading_of_graphs(py::module_& module) {
  module.def("load_frozen_graph", &load_graph);
  module.def("unload_frozen_graph", &unload_graph);
  module.def("describe_frozen_graph", &describe_graph);
}

}  // namespace fastmlp::frozen

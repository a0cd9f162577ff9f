// Reads what a module is from the dictionaries of its object, as modules.h says: some tens of nanoseconds a module.
#include "modules.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>
#include <functional>
#include <optional>

#include "../contract/activation_info.h"
#include "../tensors/devices.h"
#include "autograd.h"
#include "objects.h"

namespace fastmlp {

namespace {

enum class Role { linear, fused_linear, activation, dropout, norm };

// A class that may be part of a run, while it computes by the forward that it came with.
struct Class {
  PyTypeObject* type = nullptr;
  PyObject* forward = nullptr;
  PyObject* call = nullptr;  // null for that of torch.nn.Module
  Role role = Role::linear;
  int kind = identity_kind;               // of an activation
  std::array<PyObject*, 2> attributes{};  // of its parameters
};

// Objects that live as long as the process.
struct Known {
  std::vector<Class> classes;
  std::vector<PyObject*> watchers;
  PyTypeObject* gelu = nullptr;
  // Found on a class, they say that nobody has replaced them.
  PyTypeObject* module = nullptr;
  PyObject *module_call = nullptr, *sequential_forward = nullptr, *layer_forward = nullptr;
  int gelu_tanh_kind = 0;
};
Known known;

const Class* class_of(PyObject* module) {
  for (const Class& candidate : known.classes) {
    if (Py_TYPE(module) == candidate.type) {
      // Patches of all modules at once are for the container's own call to see.
      PyObject* call = candidate.call ? candidate.call : _PyType_Lookup(known.module, names().call);
      const bool original = _PyType_Lookup(candidate.type, names().forward) == candidate.forward &&
                            _PyType_Lookup(candidate.type, names().call) == call;
      return original ? &candidate : nullptr;
    }
  }
  return nullptr;
}

// None if an attribute is not what the class itself would have put there, or a number that no kernel takes.
std::optional<ActivationSpec> activation_of(const Class& c, PyObject* attributes) {
  ActivationSpec spec{c.kind, {}};
  std::array<double*, 2> values = {&spec.scalars.a, &spec.scalars.b};
  for (size_t i = 0; i < values.size() && c.attributes[i]; i++) {
    const std::optional<double> value = number_of(item(attributes, c.attributes[i]));
    if (!value || !activation_info(c.kind).parameters[i].allows(*value)) return std::nullopt;
    *values[i] = *value;
  }
  if (c.type == known.gelu) {
    PyObject* form = item(attributes, names().approximate);
    if (is_text(form, "tanh")) {
      spec.kind = known.gelu_tanh_kind;
    } else if (!is_text(form, "none")) {
      return std::nullopt;
    }
  }
  return spec;
}

// That of a fastmlp.Linear, a fastmlp.Activation.
std::optional<ActivationSpec> own_activation(PyObject* attributes) {
  PyObject* activation = item(attributes, names().activation);
  if (!activation) return std::nullopt;
  const auto fields = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(activation, nullptr));
  PyObject* kind = fields ? item(fields.ptr(), names().kind) : nullptr;
  PyObject* scalars = fields ? item(fields.ptr(), names().scalars) : nullptr;
  if (!kind || !scalars || !PyTuple_Check(scalars) || PyTuple_GET_SIZE(scalars) != 2) {
    PyErr_Clear();
    return std::nullopt;
  }
  return ActivationSpec{
      int(PyLong_AsLong(kind)),
      {PyFloat_AsDouble(PyTuple_GET_ITEM(scalars, 0)), PyFloat_AsDouble(PyTuple_GET_ITEM(scalars, 1))}};
}

}  // namespace

PyObject* children_of(PyObject* attributes) {
  PyObject* children = item(attributes, names().modules);
  return children && PyDict_Check(children) ? children : nullptr;
}

Hooks hooks_of(PyObject* attributes) {
  Hooks all;
  std::transform(names().hooks.begin(), names().hooks.end(), all.begin(),
                 [&](PyObject* name) { return item(attributes, name); });
  return all;
}

bool any_filled(const Hooks& hooks) { return std::any_of(hooks.begin(), hooks.end(), filled); }

bool must_be_called(PyObject* attributes) {
  if (any_filled(hooks_of(attributes))) return true;
  PyObject* compiled = item(attributes, names().compiled);
  return item(attributes, names().forward) || (compiled && compiled != Py_None);
}

bool is_layer(PyObject* module) {
  if (PyTuple_CheckExact(module)) return true;
  const Class* c = class_of(module);
  return c && (c->role == Role::linear || c->role == Role::fused_linear);
}

bool is_watched() { return std::any_of(known.watchers.begin(), known.watchers.end(), filled); }

bool Run::drops() const {
  return std::any_of(layers_.begin(), layers_.end(), [](const LayerSpec& layer) { return layer.dropout > 0; });
}

bool Run::add_layer(PyObject* attributes, const ActivationSpec& activation) {
  PyObject* parameters = item(attributes, names().parameters);
  if (!parameters || !PyDict_Check(parameters)) return false;
  // Attributes in place of parameters, as in replicas and parametrized layers: the module knows where they are.
  return add_tensors(item(parameters, names().weight), item(parameters, names().bias), activation);
}

// False if the layer's weight is not of the kind of those before it.
bool Run::add_tensors(PyObject* weight, PyObject* bias, const ActivationSpec& activation) {
  if (!weight || !bias || !THPVariable_Check(weight)) return false;
  if (!parameters_.empty()) {
    const at::Tensor& first = THPVariable_Unpack(parameters_[0]);
    const at::Tensor& own = THPVariable_Unpack(weight);
    if (own.scalar_type() != first.scalar_type() || own.device() != first.device()) return false;
  }
  parameters_.push_back(weight);
  if (bias != Py_None) parameters_.push_back(bias);
  layers_.emplace_back().has_bias = bias != Py_None;
  set_activation(activation);
  return true;
}

void Run::add_empty_layer() {
  LayerSpec& layer = layers_.emplace_back();
  layer.map = Map::none;
  layer.has_weight = false;
  activated_ = false;
}

bool Run::add_activation(const ActivationSpec& activation) {
  if (activation.kind == identity_kind) return true;
  if (empty() || activated_) {
    if (takes_ != Takes::step) return false;
    add_empty_layer();
  }
  set_activation(activation);
  return true;
}

bool Run::add_dropout(PyObject* attributes) {
  PyObject* training = item(attributes, names().training);
  const std::optional<double> p = number_of(item(attributes, names().p));
  if (training == Py_False || p == 0.0) return true;
  PyObject* in_place = item(attributes, names().inplace);
  if (training != Py_True || !p || !(*p > 0 && *p <= 1) || !(in_place == Py_True || in_place == Py_False)) return false;
  if (takes_ == Takes::step) {
    // It would change what somebody else may hold, such as the input.
    if (in_place == Py_True) return false;
    if (empty() || layers_.back().dropout > 0) add_empty_layer();
  } else if (!last_layer_may_drop(in_place == Py_True)) {
    return false;
  }
  layers_.back().dropout = *p;
  activated_ = true;
  return true;
}

bool Run::last_layer_may_drop(bool in_place) const {
  const LayerSpec& last = layers_.back();
  const at::Tensor& weight = THPVariable_Unpack(parameters_[0]);
  if (takes_ != Takes::dropout || last.dropout > 0 || !layers_drop(weight.device().type(), weight.scalar_type()))
    return false;
  // Nobody else holds what a layer computes. But torch keeps the output of some activations for backward, and raises
  // there if it has been changed; which a call of the dropout by itself does, too.
  const int kind = last.activation.kind;
  return !in_place || kind == identity_kind || !has_gradient_from_output(kind);
}

// As torch's module reads itself in its forward.
bool Run::add_norm(PyObject* attributes) {
  PyObject* parameters = item(attributes, names().parameters);
  PyObject* buffers = item(attributes, names().buffers);
  PyObject* training = item(attributes, names().training);
  PyObject* tracks = item(attributes, names().tracks);
  const auto is_flag = [](PyObject* object) { return object == Py_True || object == Py_False; };
  if (!parameters || !buffers || !PyDict_Check(parameters) || !PyDict_Check(buffers) || !is_flag(training) ||
      !is_flag(tracks))
    return false;
  const std::optional<double> eps = number_of(item(attributes, names().eps));
  PyObject* momentum = item(attributes, names().momentum);
  RunNorm norm;
  norm.momentum = number_of(momentum);
  if (!eps || !(norm.momentum || momentum == Py_None)) return false;
  norm.eps = *eps;
  PyObject *weight = item(parameters, names().weight), *bias = item(parameters, names().bias);
  PyObject* mean = item(buffers, names().running_mean);
  PyObject* variance = item(buffers, names().running_variance);
  PyObject* batches = item(buffers, names().batches);
  // Attributes in place of parameters and buffers: the module knows where they are.
  if (!weight || !bias || !mean || !variance || !batches || (mean == Py_None) != (variance == Py_None)) return false;
  norm.of_batch = training == Py_True || mean == Py_None;
  const bool moves = training == Py_True && tracks == Py_True;
  if (mean != Py_None && (moves || training == Py_False)) {
    norm.running_mean = mean;
    norm.running_variance = variance;
  }
  if (moves && batches != Py_None) norm.batches = batches;
  LayerSpec& layer = layers_.emplace_back();
  layer.map = Map::batch_norm;
  layer.has_weight = weight != Py_None;
  layer.has_bias = bias != Py_None;
  for (PyObject* parameter : {weight, bias}) {
    if (parameter != Py_None) parameters_.push_back(parameter);
  }
  norms_.push_back(norm);
  activated_ = false;
  return true;
}

void Run::set_activation(const ActivationSpec& activation) {
  layers_.back().activation = activation;
  activated_ = activation.kind != identity_kind;
}

bool Run::add_fused_layer(PyObject* attributes) {
  const std::optional<ActivationSpec> activation = own_activation(attributes);
  return activation && add_layer(attributes, *activation);
}

bool Run::extend(PyObject* module) {
  if (PyTuple_CheckExact(module)) {
    return add_tensors(PyTuple_GET_ITEM(module, 0), PyTuple_GET_ITEM(module, 1), ActivationSpec{identity_kind, {}});
  }
  const Class* c = class_of(module);
  const bool begins = takes_ != Takes::step && empty();
  if (!c || (begins && c->role != Role::linear && c->role != Role::fused_linear)) return false;
  const py::object attributes = attributes_of(module);
  if (must_be_called(attributes.ptr())) return false;
  switch (c->role) {
    case Role::linear:
      return add_layer(attributes.ptr(), ActivationSpec{identity_kind, {}});
    case Role::fused_linear:
      return add_fused_layer(attributes.ptr());
    case Role::dropout:
      return add_dropout(attributes.ptr());
    case Role::norm:
      return takes_ == Takes::step && add_norm(attributes.ptr());
    case Role::activation: {
      const std::optional<ActivationSpec> activation = activation_of(*c, attributes.ptr());
      return activation && add_activation(*activation);
    }
  }
  return false;
}

// Stacks that were parsed before are found by what they are made of. A fixed number, so that it does not grow.
c10::intrusive_ptr<Stack> Run::stack() const {
  static std::array<c10::intrusive_ptr<Stack>, 256> recent;
  size_t hash = layers_.size();
  const auto mix = [&](size_t value) { hash = (hash ^ value) * 0x9e3779b97f4a7c15u; };
  for (const LayerSpec& layer : layers_) {
    const ActivationSpec& activation = layer.activation;
    mix(size_t(((activation.kind * 3 + int(layer.map)) * 2 + layer.has_bias) * 2 + layer.has_weight));
    mix(std::hash<double>()(activation.scalars.a));
    mix(std::hash<double>()(activation.scalars.b));
    mix(std::hash<double>()(layer.dropout));
  }
  c10::intrusive_ptr<Stack>& place = recent[hash >> 56];
  if (!place || place->specs() != layers()) {
    place = c10::make_intrusive<Stack>(std::vector<LayerSpec>(layers_.begin(), layers_.end()));
  }
  return place;
}

void register_modules(const py::object& linear, const py::object& fused_linear, const py::object& dropout,
                      const py::object& norm, const py::object& sequential, const py::dict& activations,
                      const py::dict& kinds, const py::dict& forwards, const py::tuple& watchers) {
  const auto forever = [](py::handle object) { return object.inc_ref().ptr(); };
  const auto type_of = [&](py::handle type) { return reinterpret_cast<PyTypeObject*>(forever(type)); };
  known.module = type_of(py::module_::import("torch.nn").attr("Module"));
  known.module_call = _PyType_Lookup(known.module, names().call);
  const auto add = [&](py::handle type, Role role) -> Class& {
    PyObject* forward = item(forwards.ptr(), type.ptr());
    Class& c = known.classes.emplace_back();
    c.type = type_of(type);
    c.forward = forward ? forever(forward) : nullptr;
    PyObject* call = _PyType_Lookup(c.type, names().call);
    c.call = call == known.module_call ? nullptr : call;
    c.role = role;
    return c;
  };
  add(linear, Role::linear);
  add(fused_linear, Role::fused_linear);
  for (const auto& [type, description] : activations) {
    Class& c = add(type, Role::activation);
    const auto [name, attributes] = description.cast<std::pair<std::string, std::vector<std::string>>>();
    c.kind = kinds[py::str(name)].cast<int>();
    for (size_t i = 0; i < attributes.size(); i++) c.attributes[i] = interned(attributes[i].c_str());
    if (name == "gelu") known.gelu = c.type;
  }
  add(dropout, Role::dropout);
  add(norm, Role::norm);
  known.layer_forward = _PyType_Lookup(type_of(fused_linear), names().forward);
  known.sequential_forward = _PyType_Lookup(type_of(sequential), names().forward);
  known.gelu_tanh_kind = kinds["gelu_tanh"].cast<int>();
  for (const py::handle watcher : watchers) known.watchers.push_back(forever(watcher));
}

Forward forward_of(PyObject* module) {
  if (_PyType_Lookup(known.module, names().call) != known.module_call) return Forward::other;
  const PyObject* forward = _PyType_Lookup(Py_TYPE(module), names().forward);
  if (forward == known.sequential_forward) return Forward::sequential;
  return forward == known.layer_forward ? Forward::layer : Forward::other;
}

}  // namespace fastmlp

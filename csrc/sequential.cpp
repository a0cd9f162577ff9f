// The rule of sequential.h, by lookups in the children's dictionaries: some tens of nanoseconds a child.
#include "sequential.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>
#include <functional>
#include <optional>

#include "activation_info.h"
#include "autograd.h"
#include "operators.h"
#include "route.h"

namespace fastmlp {
namespace {

enum class Role { linear, fused_linear, activation, dropout };

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
  PyObject* composed = nullptr;
  PyTypeObject* gelu = nullptr;
  // Found on a class, they say that nobody has replaced them.
  PyTypeObject* module = nullptr;
  PyObject *module_call = nullptr, *sequential_forward = nullptr, *layer_forward = nullptr;
  int gelu_tanh_kind = 0;
};
Known known;

struct Names {
  static PyObject* intern(const char* name) { return PyUnicode_InternFromString(name); }
  PyObject* forward = intern("forward");
  PyObject* call = intern("__call__");
  PyObject* modules = intern("_modules");
  PyObject* parameters = intern("_parameters");
  PyObject* weight = intern("weight");
  PyObject* bias = intern("bias");
  PyObject* activation = intern("activation");
  PyObject* kind = intern("kind");
  PyObject* scalars = intern("scalars");
  PyObject* approximate = intern("approximate");
  PyObject* training = intern("training");
  PyObject* compiled = intern("_compiled_call_impl");
  std::array<PyObject*, 4> hooks = {intern("_forward_hooks"), intern("_forward_pre_hooks"), intern("_backward_hooks"),
                                    intern("_backward_pre_hooks")};
};
const Names& names() {
  static const Names all;
  return all;
}

PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* found = PyDict_GetItemWithError(dict, key);
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

bool filled(PyObject* dict) { return dict && PyDict_Check(dict) && PyDict_GET_SIZE(dict) > 0; }

py::object attributes_of(PyObject* module) {
  return py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
}

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

// Whether something wants the module itself to be called.
bool must_be_called(PyObject* attributes) {
  for (PyObject* hooks : names().hooks) {
    if (filled(item(attributes, hooks))) return true;
  }
  PyObject* compiled = item(attributes, names().compiled);
  return item(attributes, names().forward) || (compiled && compiled != Py_None);
}

bool is_watched() { return std::any_of(known.watchers.begin(), known.watchers.end(), filled); }

// What a run needs of its tensors while no Python code runs that could free them.
struct Run {
  c10::SmallVector<PyObject*, 16> parameters;
  c10::SmallVector<bool, 8> has_bias;
  c10::SmallVector<int64_t, 8> kinds;
  c10::SmallVector<double, 16> scalars;
  bool activated = false;  // the last layer has its activation

  bool empty() const { return kinds.empty(); }

  void add_layer(PyObject* weight, PyObject* bias) {
    parameters.push_back(weight);
    if (bias) parameters.push_back(bias);
    has_bias.push_back(bias != nullptr);
    kinds.push_back(identity_kind);
    scalars.append({0.0, 0.0});
    activated = false;
  }
  void set_activation(const ActivationSpec& spec) {
    kinds.back() = spec.kind;
    scalars[scalars.size() - 2] = spec.scalars.a;
    scalars[scalars.size() - 1] = spec.scalars.b;
    activated = spec.kind != identity_kind;
  }
};

std::optional<double> number(PyObject* object) {
  if (!object || !(PyFloat_Check(object) || PyLong_Check(object))) return std::nullopt;
  const double value = PyFloat_AsDouble(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// None if an attribute is not what the class itself would have put there.
std::optional<ActivationSpec> activation_of(const Class& c, PyObject* attributes) {
  ActivationSpec spec{c.kind, {}};
  std::array<double*, 2> values = {&spec.scalars.a, &spec.scalars.b};
  for (size_t i = 0; i < values.size() && c.attributes[i]; i++) {
    const std::optional<double> value = number(item(attributes, c.attributes[i]));
    if (!value) return std::nullopt;
    *values[i] = *value;
  }
  if (c.type == known.gelu) {
    PyObject* form = item(attributes, names().approximate);
    if (!form || !PyUnicode_Check(form)) return std::nullopt;
    if (PyUnicode_CompareWithASCIIString(form, "tanh") == 0) {
      spec.kind = known.gelu_tanh_kind;
    } else if (PyUnicode_CompareWithASCIIString(form, "none") != 0) {
      return std::nullopt;
    }
  }
  return spec;
}

// That of a fastmlp.Linear, a fastmlp.Activation.
std::optional<ActivationSpec> own_activation(PyObject* attributes) {
  PyObject* activation = item(attributes, names().activation);
  if (!activation) return std::nullopt;
  const py::object fields = attributes_of(activation);
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

// Adds a layer whose weight is of the kind of those before it; false if this one is not.
bool add_layer(Run& run, Role role, PyObject* attributes) {
  PyObject* parameters = item(attributes, names().parameters);
  if (!parameters || !PyDict_Check(parameters)) return false;
  // Attributes in place of parameters, as in replicas and parametrized layers: the module knows where they are.
  PyObject* weight = item(parameters, names().weight);
  PyObject* bias = item(parameters, names().bias);
  if (!weight || !bias || !THPVariable_Check(weight)) return false;
  if (bias == Py_None) bias = nullptr;
  if (!run.empty()) {
    const at::Tensor& first = THPVariable_Unpack(run.parameters[0]);
    const at::Tensor& own = THPVariable_Unpack(weight);
    if (own.scalar_type() != first.scalar_type() || own.device() != first.device()) return false;
  }
  std::optional<ActivationSpec> spec = ActivationSpec{};
  if (role == Role::fused_linear) spec = own_activation(attributes);
  if (!spec) return false;
  run.add_layer(weight, bias);
  run.set_activation(*spec);
  return true;
}

// Takes the child into the run; false if it ends the run.
bool extend(Run& run, PyObject* child) {
  const Class* c = class_of(child);
  if (!c || (run.empty() && c->role != Role::linear && c->role != Role::fused_linear)) return false;
  const py::object attributes = attributes_of(child);
  if (!attributes) throw py::error_already_set();
  if (must_be_called(attributes.ptr())) return false;
  switch (c->role) {
    case Role::linear:
    case Role::fused_linear:
      return add_layer(run, c->role, attributes.ptr());
    case Role::dropout:
      return item(attributes.ptr(), names().training) == Py_False;
    case Role::activation: {
      const std::optional<ActivationSpec> spec = activation_of(*c, attributes.ptr());
      if (!spec || (run.activated && spec->kind != identity_kind)) return false;
      if (!run.activated) run.set_activation(*spec);
      return true;
    }
  }
  return false;
}

// Stacks that were parsed before, found by what they are made of. A fixed number, so that it does not grow.
c10::intrusive_ptr<Stack> stack_of(const Run& run) {
  static std::array<c10::intrusive_ptr<Stack>, 256> recent;
  size_t hash = run.kinds.size();
  const auto mix = [&](size_t value) { hash = (hash ^ value) * 0x9e3779b97f4a7c15u; };
  for (const int64_t kind : run.kinds) mix(size_t(kind));
  for (const bool bias : run.has_bias) mix(bias);
  for (const double scalar : run.scalars) mix(std::hash<double>()(scalar));
  c10::intrusive_ptr<Stack>& place = recent[hash >> 56];
  if (!place || !place->equals(run.has_bias, run.kinds, run.scalars)) {
    place = c10::make_intrusive<Stack>(std::vector<bool>(run.has_bias.begin(), run.has_bias.end()),
                                       std::vector<int64_t>(run.kinds.begin(), run.kinds.end()),
                                       std::vector<double>(run.scalars.begin(), run.scalars.end()));
  }
  return place;
}

py::object execute(const Run& run, const py::object& input) {
  if (!obstacle(input.ptr(), run.parameters)) {
    Tensors parameters;
    parameters.reserve(run.parameters.size());
    for (PyObject* parameter : run.parameters) parameters.push_back(THPVariable_Unpack(parameter));
    return py::cast(fastmlp::run(stack_of(run), THPVariable_Unpack(input.ptr()), parameters));
  }
  py::tuple parameters(run.parameters.size());
  for (size_t i = 0; i < run.parameters.size(); i++) {
    parameters[i] = py::reinterpret_borrow<py::object>(run.parameters[i]);
  }
  const auto list = [](const auto& values) { return std::vector(values.begin(), values.end()); };
  const auto composed = py::reinterpret_borrow<py::function>(known.composed);
  return composed(list(run.has_bias), list(run.kinds), list(run.scalars), input, parameters);
}

py::object call(const py::object& child, const py::object& input) {
  PyObject* output = PyObject_CallOneArg(child.ptr(), input.ptr());
  if (!output) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(output);
}

}  // namespace

void register_modules(const py::object& linear, const py::object& fused_linear, const py::object& dropout,
                      const py::object& sequential, const py::dict& activations, const py::dict& kinds,
                      const py::dict& forwards, const py::tuple& watchers, const py::function& composed) {
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
    for (size_t i = 0; i < attributes.size(); i++) c.attributes[i] = Names::intern(attributes[i].c_str());
    if (name == "gelu") known.gelu = c.type;
  }
  add(dropout, Role::dropout);
  known.layer_forward = _PyType_Lookup(type_of(fused_linear), names().forward);
  known.sequential_forward = _PyType_Lookup(type_of(sequential), names().forward);
  known.gelu_tanh_kind = kinds["gelu_tanh"].cast<int>();
  for (const py::handle watcher : watchers) known.watchers.push_back(forever(watcher));
  known.composed = forever(composed);
}

py::object run_children(const py::dict& children, py::object input) {
  // Children may change the dictionary, and drop themselves, while they run.
  c10::SmallVector<py::object, 16> modules;
  if (PyDict_CheckExact(children.ptr())) {
    PyObject *key = nullptr, *child = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(children.ptr(), &at, &key, &child);) {
      modules.push_back(py::reinterpret_borrow<py::object>(child));
    }
  } else {  // an OrderedDict, whose order is its own
    for (const py::handle child : children.attr("values")())
      modules.push_back(py::reinterpret_borrow<py::object>(child));
  }
  const bool watched = is_watched();
  for (size_t i = 0; i < modules.size();) {
    Run run;
    // What is no tensor, such as the proxies of torch.fx, is to see every child.
    size_t end = i;
    if (!watched && THPVariable_Check(input.ptr())) {
      while (end < modules.size() && extend(run, modules[end].ptr())) end++;
    }
    input = run.empty() ? call(modules[i], input) : execute(run, input);
    i = std::max(end, i + 1);
  }
  return input;
}

py::object run_layer(const py::handle& layer, const py::object& input) {
  Run run;
  const py::object attributes = attributes_of(layer.ptr());
  const bool own = attributes && add_layer(run, Role::fused_linear, attributes.ptr());
  return own && THPVariable_Check(input.ptr()) ? execute(run, input) : py::none();
}

py::object call_module(const py::handle& module, const py::tuple& args, const py::dict& kwargs) {
  const auto slow = [] { return py::reinterpret_borrow<py::object>(Py_NotImplemented); };
  if (args.size() != 1 || !kwargs.empty() || !THPVariable_Check(args[0].ptr())) return slow();
  if (is_watched() || c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer)) return slow();
  if (_PyType_Lookup(known.module, names().call) != known.module_call) return slow();
  const py::object attributes = attributes_of(module.ptr());
  if (!attributes) throw py::error_already_set();
  if (must_be_called(attributes.ptr())) return slow();
  const PyObject* forward = _PyType_Lookup(Py_TYPE(module.ptr()), names().forward);
  if (forward == known.sequential_forward) {
    PyObject* children = item(attributes.ptr(), names().modules);
    if (!children) return slow();
    return run_children(py::reinterpret_borrow<py::dict>(children), args[0]);
  }
  if (forward != known.layer_forward) return slow();
  const py::object output = run_layer(module, args[0]);
  return output.is_none() ? slow() : output;
}

}  // namespace fastmlp

// How the children of a container are called: side by side as one operation where they form a run, else one by one.
#include "sequential.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "autograd.h"
#include "../tensors/borrowed.h"
#include "modules.h"
#include "objects.h"
#include "route.h"

namespace fastmlp {
namespace {

PyObject* composed_forward = nullptr;

// Whether dropout of a run is computed with its layers: what is not plain, or cast by autocast, is for torch's own.
bool may_drop(const Run& run, const py::object& input) {
  return !obstacle(input.ptr(), run.parameters()) && !autocast_is_active(THPVariable_Unpack(input.ptr()));
}

// `names` is asked where something is wrong, or composed.
py::object execute(const Run& run, const py::object& input, NamesOf names) {
  if (!obstacle(input.ptr(), run.parameters())) {
    Borrowed parameters;
    for (PyObject* parameter : run.parameters()) parameters.push_back(THPVariable_Unpack(parameter));
    return py::cast(fastmlp::run(run.stack(), THPVariable_Unpack(input.ptr()), parameters, names));
  }
  py::tuple parameters(run.parameters().size());
  for (size_t i = 0; i < run.parameters().size(); i++) {
    parameters[i] = py::reinterpret_borrow<py::object>(run.parameters()[i]);
  }
  const auto composed = py::reinterpret_borrow<py::function>(composed_forward);
  const ModuleNames called = names();
  const LayerLists lists(run.layers());
  return composed(lists.has_bias, lists.activations, lists.scalars, input, parameters,
                  py::make_tuple(called.input, called.layers));
}

// The key under which a child is held; where it was dropped meanwhile, its place.
std::string name_of(const py::dict& children, const c10::SmallVector<py::object, 16>& modules, size_t place) {
  for (const auto item : children.attr("items")()) {
    const auto [key, child] = item.cast<std::pair<py::object, py::object>>();
    if (child.is(modules[place])) return py::str(key);
  }
  return std::to_string(place);
}

// Of the layers among children side by side.
ModuleNames names_of(const py::dict& children, const c10::SmallVector<py::object, 16>& modules, size_t begin,
                     size_t end) {
  ModuleNames names;
  names.input = begin == 0 ? "input" : "the input of " + name_of(children, modules, begin);
  for (size_t i = begin; i < end; i++) {
    if (is_layer(modules[i].ptr())) names.layers.push_back(name_of(children, modules, i));
  }
  return names;
}

// Whether an object that is no tensor takes part in calls of torch, as the proxies of torch.fx do.
bool overrides_torch(const py::object& object) { return py::hasattr(py::type::of(object), "__torch_function__"); }

py::object call(const py::object& child, const py::object& input) {
  if (PyTuple_CheckExact(child.ptr())) {
    return py::module_::import("torch.nn.functional").attr("linear")(input, *py::reinterpret_borrow<py::tuple>(child));
  }
  PyObject* output = PyObject_CallOneArg(child.ptr(), input.ptr());
  if (!output) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(output);
}

}  // namespace

void set_composed_forward(const py::function& function) { composed_forward = function.inc_ref().ptr(); }

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
    size_t end = i;
    const auto run_of = [&](Takes takes) {
      Run found(takes);
      end = i;
      while (end < modules.size() && found.extend(modules[end].ptr())) end++;
      return found;
    };
    Run run(Takes::dropout);
    // Proxies are to see every child; whatever else is no tensor is refused by the first layer that it comes to.
    if (!watched && (THPVariable_Check(input.ptr()) || !overrides_torch(input))) {
      run = run_of(Takes::dropout);
      if (run.drops() && !may_drop(run, input)) run = run_of(Takes::layers);
    }
    input = run.empty() ? call(modules[i], input)
                        : execute(run, input, [&] { return names_of(children, modules, i, end); });
    i = std::max(end, i + 1);
  }
  return input;
}

py::object whole_run(const py::list& modules) {
  Run run(Takes::layers);
  if (is_watched()) return py::none();
  for (const py::handle module : modules) {
    if (!run.extend(module.ptr())) return py::none();
  }
  if (run.empty()) return py::none();
  const LayerLists lists(run.layers());
  py::tuple parameters(run.parameters().size());
  for (size_t i = 0; i < parameters.size(); i++)
    parameters[i] = py::reinterpret_borrow<py::object>(run.parameters()[i]);
  return py::make_tuple(py::tuple(py::cast(lists.has_bias)), py::tuple(py::cast(lists.activations)),
                        py::tuple(py::cast(lists.scalars)), parameters);
}

py::object run_layer(const py::handle& layer, const py::object& input) {
  Run run(Takes::layers);
  const bool own = run.add_fused_layer(attributes_of(layer.ptr()).ptr());
  const auto names = [] { return ModuleNames{"input", {""}}; };
  return own && THPVariable_Check(input.ptr()) ? execute(run, input, names) : py::none();
}

py::object call_module(const py::handle& module, const py::tuple& args, const py::dict& kwargs) {
  const auto slow = [] { return py::reinterpret_borrow<py::object>(Py_NotImplemented); };
  if (args.size() != 1 || !kwargs.empty() || !THPVariable_Check(args[0].ptr())) return slow();
  if (is_watched() || c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer)) return slow();
  const py::object attributes = attributes_of(module.ptr());
  if (must_be_called(attributes.ptr())) return slow();
  switch (forward_of(module.ptr())) {
    case Forward::sequential: {
      PyObject* children = children_of(attributes.ptr());
      return children ? run_children(py::reinterpret_borrow<py::dict>(children), args[0]) : slow();
    }
    case Forward::layer: {
      const py::object output = run_layer(module, args[0]);
      return output.is_none() ? slow() : output;
    }
    case Forward::other:
      break;
  }
  return slow();
}

}  // namespace fastmlp

// The names that Python sees: the module _C for direct calls, and the operators' schemas for the dispatcher. Computes
// nothing, checks nothing and names no device: other files of the folder and the table of devices do.
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "autograd.h"
#include "capture.h"
#include "clip.h"
#include "../contract/training_info.h"
#include "../tensors/borrowed.h"
#include "../tensors/checks.h"
#include "../tensors/devices.h"
#include "frozen.h"
#include "modules.h"
#include "objects.h"
#include "optimizer.h"
#include "route.h"
#include "rows.h"
#include "sequential.h"
#include "train_step.h"

namespace fastmlp {
namespace {

py::list activations() {
  py::list all;
  for (int kind = 0; kind < Activations::size; kind++) {
    const ActivationInfo& info = activation_info(kind);
    py::dict parameters;
    py::list positive;
    for (int i = 0; i < 2 && info.parameters[i].name; i++) {
      parameters[info.parameters[i].name] = info.parameters[i].initial;
      if (info.parameters[i].positive) positive.append(info.parameters[i].name);
    }
    all.append(py::make_tuple(info.name, parameters, positive, info.keeps_output, has_gradient_from_output(kind)));
  }
  return all;
}

// Of each loss what its module has: the class, a number with its limits, an index, and a buffer that has to be None;
// and the activation or head that it is taken after, if after one alone.
py::list losses() {
  py::list all;
  for (int kind = 0; kind < Losses::size; kind++) {
    const LossInfo& info = loss_info(kind);
    const LossNumber& number = info.number;
    const auto limits = py::make_tuple(number.name, number.least, number.most, number.expected);
    all.append(py::make_tuple(info.name, number.name ? py::object(limits) : py::none(), info.index, info.unweighted,
                              info.follows));
  }
  return all;
}

// Of each rule the names of its classes, and whether it counts its steps.
py::list rules() {
  py::list all;
  for (int rule = 0; rule < Rules::size; rule++) {
    const RuleInfo& info = rule_info(rule);
    py::list classes;
    for (const char* name : info.classes) {
      if (name) classes.append(name);
    }
    all.append(py::make_tuple(classes, info.counts));
  }
  return all;
}

// Those of the host's processor.
const InstructionSets& host_sets() { return *operations_on(host.type())->instruction_sets; }

py::list instruction_sets() {
  py::list all;
  for (const InstructionSet& set : host_sets().all()) {
    py::dict described(py::arg("name") = set.name, py::arg("description") = set.description,
                       py::arg("supported") = set.supported);
    for (const auto& [dtype, sizes] : set.sizes) {
      py::dict by_name;
      for (const auto& [name, size] : sizes) by_name[name] = size;
      described[dtype] = by_name;
    }
    all.append(described);
  }
  return all;
}

std::optional<std::string> obstacle_of(py::handle input, const py::tuple& parameters) {
  const char* why = obstacle(input.ptr(), items_of(parameters.ptr()));
  return why ? std::optional<std::string>(why) : std::nullopt;
}

// An object whose __init__ has not run holds nothing.
TrainStep& initialised(const py::object& self) {
  TORCH_CHECK_TYPE(py::isinstance<TrainStep>(self) && py::detail::is_holder_constructed(self.ptr()),
                   "fastmlp: this is no TrainStep, or one whose __init__ was never called");
  return py::cast<TrainStep&>(self);
}

const Stack& initialised(const c10::intrusive_ptr<Stack>& stack) {
  TORCH_CHECK_TYPE(stack, "fastmlp: stack is None, expected a Stack");
  return *stack;
}

// The direct route, or None if something stands in its way.
std::optional<at::Tensor> try_run(const c10::intrusive_ptr<Stack>& stack, py::handle input,
                                  const py::tuple& parameters) {
  initialised(stack);
  if (obstacle(input.ptr(), items_of(parameters.ptr()))) return std::nullopt;
  Borrowed unpacked;
  for (const py::handle parameter : parameters) unpacked.push_back(THPVariable_Unpack(parameter.ptr()));
  return run(stack, THPVariable_Unpack(input.ptr()), unpacked);
}

// A model may hold the step that trains it.
void collect_train_steps(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    return py::detail::is_holder_constructed(self) ? py::cast<TrainStep&>(py::handle(self)).traverse(visit, arg) : 0;
  };
  type.tp_clear = [](PyObject* self) {
    if (py::detail::is_holder_constructed(self)) py::cast<TrainStep&>(py::handle(self)).clear();
    return 0;
  };
}

// Calls a function below autograd and without the GIL, as the dispatcher calls a kernel.
template <auto function, class... Args> auto direct(const c10::intrusive_ptr<Stack>& given, const Args&... args) {
  const Stack& stack = initialised(given);
  const py::gil_scoped_release release;
  const at::AutoDispatchBelowADInplaceOrView guard;
  return function(stack, args...);
}

}  // namespace
}  // namespace fastmlp

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fastmlp;
  prepare_routes();
  name_node();
  py::class_<Stack, c10::intrusive_ptr<Stack>>(m, "Stack")
      .def(py::init<std::vector<bool>, std::vector<int64_t>, std::vector<double>>(), py::arg("has_bias"),
           py::arg("activations"), py::arg("scalars"));
  m.def("forward", &direct<&fastmlp::forward, at::Tensor, Tensors>);
  m.def("infer", &direct<&fastmlp::infer, at::Tensor, Tensors>);
  m.def("backward", &direct<&fastmlp::backward, at::Tensor, at::Tensor, Tensors, Tensors, std::vector<bool>>);
  // For tests, which put guards around what is written.
  m.def("forward_into", &direct<&fastmlp::forward_into, at::Tensor, Tensors, at::Tensor, Tensors>);
  m.def("backward_into", &direct<&fastmlp::backward_into, at::Tensor, at::Tensor, Tensors, Tensors, Tensors>);
  m.def("check_forward",
        [](const c10::intrusive_ptr<Stack>& stack, const at::Tensor& input, const Tensors& parameters, bool same_dtype,
           const std::optional<std::pair<std::string, std::vector<std::string>>>& names) {
          const ModuleNames called = names ? ModuleNames{names->first, names->second} : ModuleNames{};
          check_forward(initialised(stack), input, parameters, same_dtype, names ? &called : nullptr);
        });
  m.def("try_run", &try_run);
  m.def("gradient_from_output", &gradient_from_output);
  m.def("with_graph", [](const c10::intrusive_ptr<Stack>& stack, const at::Tensor& input, const Tensors& parameters,
                         const at::Tensor& output) {
    initialised(stack);
    return with_graph(stack, input, parameters, output);
  });
  m.def("set_composed_backward", [](const py::function& function) { set_composed_backward(function.ptr()); });
  m.def("obstacle", &obstacle_of);
  m.def("devices", [] { return device_names(&has_kernels); });
  m.def("training_devices", [] { return device_names(&trains); });
  m.def("deriving_devices", [] { return device_names(&derives); });
  m.def("packing_devices", [] { return device_names(&packs); });
  m.def("layers_drop",
        [](const std::string& device, at::ScalarType dtype) { return layers_drop(c10::Device(device).type(), dtype); });
  m.def("absent_devices", [] {
    py::dict hints;
    for (const auto& [device, hint] : absent_devices()) hints[py::str(device)] = hint;
    return hints;
  });
  m.def("device_obstacle", [](const std::string& device) -> std::optional<std::string> {
    const char* why = device_obstacle(c10::Device(device));
    return why ? std::optional<std::string>(why) : std::nullopt;
  });
  m.def("register_modules", &register_modules);
  m.def("set_composed_forward", &set_composed_forward);
  m.def("run_children", &run_children);
  m.def("whole_run", &whole_run);
  m.def("run_layer", &run_layer);
  m.def("call_module", &call_module);
  m.def("rules", &rules);
  m.def("step_optimizer", &step_optimizer);
  m.def("drop_grads", &drop_grads);
  m.def("is_step_watched", &is_step_watched);
  m.def("register_optimizer_hooks", &register_optimizer_hooks);
  m.def("clip_grad_norm", &clip_grad_norm);
  m.def("clip_grad_value", &clip_grad_value);
  m.def("losses", &losses);
  py::class_<TrainStep>(m, "TrainStep", py::custom_type_setup(&collect_train_steps))
      .def(py::init([](py::tuple links, py::dict others, bool flattens, bool matrices_only, std::string head,
                       const std::vector<Reshaping::Call>& reshapings, py::dict holders, py::object loss, int kind,
                       py::object optimizer, int rule, py::object call, py::object forward, py::object step,
                       py::object zero_grad, std::optional<double> max_norm, std::optional<double> clip_value,
                       int64_t accumulate, bool keep_grads) {
        NetworkEnds ends{flattens, matrices_only, std::move(head), Reshapings(reshapings.begin(), reshapings.end())};
        return std::make_unique<TrainStep>(links, others, std::move(ends), holders, loss, kind, optimizer, rule,
                                           Originals{call, forward, step, zero_grad},
                                           TrainOptions{max_norm, clip_value, accumulate, keep_grads});
      }))
      .def("run", [](const py::object& self, const py::object& input,
                     const py::object& target) { return initialised(self).run(input, target); })
      .def("run_all",
           [](const py::object& self, const at::Tensor& inputs, const at::Tensor& targets, const at::Tensor& order,
              int64_t rows) { return initialised(self).run_all(inputs, targets, order, rows); })
      .def_property(
          "waiting", [](const py::object& self) { return initialised(self).waiting; },
          [](const py::object& self, int64_t waiting) { initialised(self).waiting = waiting; });
  m.def("has_plain_rows", [](const py::object& tensor) { return has_plain_rows(tensor.ptr()); });
  m.def("has_hooks", &has_hooks);
  add_frozen(m);
  add_capture(m);
  m.def("activations", &activations);
  m.def("instruction_sets", &instruction_sets);
  m.def("dtypes", [] { return std::vector<std::string>{"float32", "float64", "bfloat16", "float16"}; });
  m.def("get_isa", host_sets().active);
  m.def("set_isa", host_sets().set_active);
  m.def("last_isa", host_sets().last);
  m.def("decode_features", [](uint32_t leaf1_ecx, uint32_t leaf7_ebx, uint32_t leaf7_1_eax, uint64_t xcr0) {
    return host_sets().supported_by({leaf1_ecx, leaf7_ebx, leaf7_1_eax, xcr0});
  });
}

TORCH_LIBRARY(fastmlp, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "forward(Tensor input, Tensor[] parameters, bool[] has_bias, int[] activations, float[] scalars)"
      " -> (Tensor, Tensor[])",
      tags);
  m.def("infer(Tensor input, Tensor[] parameters, bool[] has_bias, int[] activations, float[] scalars) -> Tensor",
        tags);
  m.def(
      "backward(Tensor grad, Tensor input, Tensor[] saved, Tensor[] parameters, bool[] has_bias, int[] activations,"
      " float[] scalars, bool[] needs) -> Tensor[]",
      tags);
  // For fastmlp/derivatives.py, which does not call them under compilers.
  m.def(
      "derivatives(Tensor input, Tensor[] parameters, bool[] has_bias, int[] activations, float[] scalars, int[] axes,"
      " int[] pairs, int[] pairs_end, bool keep) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "derivatives_backward(Tensor? grad, Tensor? grad_first, Tensor? grad_second, Tensor input, Tensor kept,"
      " Tensor[] parameters, bool[] has_bias, int[] activations, float[] scalars, int[] axes, int[] pairs,"
      " int[] pairs_end, bool[] needs) -> Tensor[]");
}

// How Python makes a tape out of what it recorded: the arguments of each operator become a stack, as its schema says.
// Called by fastmlp/tape/. Checks nothing that the recorder has checked.
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "capture.h"
#include "objects.h"
#include "route.h"

namespace fastmlp {
namespace {

Owner owner_of(const std::string& name) {
  if (name == "arena") return Owner::arena;
  if (name == "tape") return Owner::tape;
  if (name == "grad") return Owner::grad;
  if (name == "outside") return Owner::outside;
  if (name == "result") return Owner::result;
  TORCH_CHECK_VALUE(false, "fastmlp: owner must be arena, tape, grad, outside or result, got ", name);
}

// A number of Python where an operator takes a tensor: it does not count when dtypes are promoted.
at::Tensor wrapped_number(const py::object& number) {
  at::Tensor tensor;
  if (PyBool_Check(number.ptr())) {
    tensor = at::scalar_tensor(number.cast<bool>(), at::kBool);
  } else if (PyLong_Check(number.ptr())) {
    tensor = at::scalar_tensor(number.cast<int64_t>(), at::kLong);
  } else if (PyComplex_Check(number.ptr())) {
    const Py_complex value = PyComplex_AsCComplex(number.ptr());
    tensor = at::scalar_tensor(c10::complex<double>(value.real, value.imag), at::kComplexDouble);
  } else {
    tensor = at::scalar_tensor(number.cast<double>(), at::kDouble);
  }
  tensor.unsafeGetTensorImpl()->set_wrapped_number(true);
  return tensor;
}

void add_call(Tape& tape, const std::string& name, const std::string& overload, const py::tuple& args,
              const py::dict& kwargs, std::vector<int> results, std::string place) {
  const c10::OperatorHandle operation = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
  torch::jit::Stack stack =
      torch::jit::createStackForSchema(operation.schema(), torch::jit::tuple_slice(args),
                                       py::kwargs(py::reinterpret_borrow<py::kwargs>(kwargs)), std::nullopt);
  tape.add_call(operation, std::move(stack), std::move(results), std::move(place));
}

int add_external(Tape& tape, int memory, const at::Tensor& like, int argument, int grad_of, bool held, bool written,
                 bool counted, std::optional<bool> starts_with_grad) {
  External external;
  external.memory = memory;
  external.argument = argument;
  external.grad_of = grad_of;
  if (held) external.held = like;
  external.written = written;
  external.counted = counted;
  external.dtype = like.scalar_type();
  external.sizes = like.sizes().vec();
  external.strides = like.strides().vec();
  external.requires_grad = like.requires_grad();
  external.starts_with_grad = starts_with_grad;
  return tape.add_external(std::move(external));
}

void finish(Tape& tape, const std::vector<std::pair<int, int>>& lifetimes,
            const std::vector<std::tuple<int, int, bool, bool>>& results) {
  std::vector<Result> all;
  for (const auto& [tensor, external, requires_grad, inference] : results)
    all.push_back({tensor, external, requires_grad, inference});
  tape.finish(lifetimes, std::move(all));
}

// A signature, with what is in the arguments that it was made of.
struct Call {
  Signature signature;
  std::vector<at::Tensor> tensors;
};

Call call_of(const py::tuple& args, const py::dict& kwargs) {
  std::vector<at::Tensor> tensors;
  Signature signature = Signature::of(args, kwargs, tensors);
  return {std::move(signature), std::move(tensors)};
}

py::list objects_of(const Call& call) {
  py::list objects;
  call.signature.args.objects(objects);
  call.signature.kwargs.objects(objects);
  return objects;
}

py::list borrowed_by(const Call& call) {
  py::list objects;
  call.signature.args.borrowed(objects);
  call.signature.kwargs.borrowed(objects);
  return objects;
}

void pin(Call& call, const std::vector<at::Tensor>& tensors) {
  call.signature.args.pin(tensors);
  call.signature.kwargs.pin(tensors);
}

int64_t add_recording(Recordings& all, const std::shared_ptr<Tape>& tape, const Call& call, const Call& returned,
                      const Surroundings& surroundings,
                      const std::vector<std::tuple<py::object, py::object, int>>& stops) {
  auto recording =
      std::make_unique<Recording>(Recording{call.signature, returned.signature.args, surroundings, tape, {}});
  for (const auto& [optimizer, step, rule] : stops) recording->stops.push_back({optimizer.ptr(), step.ptr(), rule});
  return all.add(std::move(recording));
}

}  // namespace

void add_capture(py::module_& m) {
  py::class_<Tape, std::shared_ptr<Tape>> tape(m, "Tape");
  add_capture_nodes(m, tape);
  tape.def(py::init<>())
      .def("add_memory",
           [](Tape& tape, const std::string& owner, int64_t bytes) { return tape.add_memory(owner_of(owner), bytes); })
      .def("add_tensor",
           [](Tape& tape, int memory, const at::Tensor& like, const std::vector<int64_t>& sizes,
              const std::vector<int64_t>& strides,
              int64_t offset) { return tape.add_tensor(memory, like.scalar_type(), sizes, strides, offset); })
      .def("tensor", [](const Tape& tape, int index) { return tape.tensor(index); })
      .def("add_external", &add_external, py::arg("memory"), py::arg("like"), py::arg("argument"), py::arg("grad_of"),
           py::arg("held"), py::arg("written"), py::arg("counted"), py::arg("starts_with_grad"))
      .def("add_call", &add_call)
      .def("add_grad", &Tape::add_grad)
      .def("add_check", &Tape::add_check)
      .def("add_stop", &Tape::add_stop)
      .def("finish", &finish)
      .def("measure_each", &Tape::measure_each)
      .def("times", &Tape::times)
      .def_property_readonly("arena_bytes", &Tape::arena_bytes)
      .def_property_readonly("own_bytes", &Tape::own_bytes)
      .def_property_readonly("calls", &Tape::calls)
      .def_property_readonly("direct_calls", &Tape::direct_calls);
  py::class_<Surroundings>(m, "Surroundings")
      .def(py::init<>())
      .def("add_dict", &Surroundings::add_dict)
      .def("add_item", &Surroundings::add_item)
      .def("add_sequence", &Surroundings::add_sequence)
      .def("add_cell", &Surroundings::add_cell)
      .def("add_attribute", &Surroundings::add_attribute)
      .def("add_hooks", &Surroundings::add_hooks)
      .def("add_size", &Surroundings::add_size)
      .def("changed", &Surroundings::changed);
  py::class_<Call>(m, "Signature")
      .def(py::init(&call_of))
      .def("matches",
           [](const Call& call, const py::tuple& args, const py::dict& kwargs) {
             std::vector<at::Tensor> tensors;
             return call.signature.match(TorchModes::now(), args, kwargs, tensors);
           })
      .def_readonly("tensors", &Call::tensors)
      .def("forget_tensors", [](Call& call) { call.tensors.clear(); })
      .def("pin", &pin)
      .def_property_readonly("borrowed", &borrowed_by)
      .def_property_readonly("objects", &objects_of);
  // With attributes, for what recordings borrow: it lives as long as a call of this object.
  py::class_<Recordings>(m, "Recordings", py::dynamic_attr())
      .def(py::init<>())
      .def("replay", [](Recordings& all, const py::tuple& args, const py::dict& kwargs,
                        const py::object& otherwise) { return all.replay(args, kwargs).value_or(otherwise); })
      .def("add", &add_recording)
      .def("ids", &Recordings::ids)
      .def("__len__", &Recordings::size)
      .def_property_readonly("replays", &Recordings::replays);
  m.def("wrapped_number", &wrapped_number);
  m.def("no_mode_is_active", &no_mode_is_active);
}

}  // namespace fastmlp

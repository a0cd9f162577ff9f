// Tensors and NumPy arrays -> cpu::FrozenNetwork::run, and tensors of other devices -> DeviceNetwork::run. A class of
// the C API, since a call through it costs a third of one through pybind11. All checks come before anything is written.
#include "frozen.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <pybind11/numpy.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>
#include <new>
#include <string>

#include "cpu/frozen.h"
#include "cpu/workspace.h"
#include "frozen_device.h"
#include "frozen_watch.h"
#include "passes.h"
#include "route.h"
#include "stack.h"

namespace fastmlp {
namespace {

using cpu::FrozenNetwork;
using cpu::InputRows;

// Other threads of Python wait while so many multiply-adds are done: a few microseconds.
constexpr double kept_gil = 1 << 16;

// One of the two networks, or none yet.
struct State {
  std::shared_ptr<const FrozenNetwork> network;
  std::shared_ptr<DeviceNetwork> on_device;
  bool matrices_only = false;  // inputs must have two dimensions
  Watch watch;
  bool stale = false;  // the model changed and was not read since
};

struct Frozen {
  PyObject object;  // first, for Python
  State* state;
};

PyTypeObject* frozen_type = nullptr;

State& state_of(PyObject* self) {
  TORCH_CHECK_TYPE(PyObject_TypeCheck(self, frozen_type), "fastmlp: expected a FrozenMLP, got ",
                   Py_TYPE(self)->tp_name);
  return *reinterpret_cast<Frozen*>(self)->state;
}

void check_filled(const State& state) {
  TORCH_CHECK(state.network || state.on_device,
              "fastmlp: this FrozenMLP holds no network; fastmlp.freeze makes one that does");
}

struct Known {
  PyObject* input = PyUnicode_InternFromString("input");
  PyObject* out = PyUnicode_InternFromString("out");
  PyObject* reload = PyUnicode_InternFromString("_reload");
  PyObject* numpy = PyUnicode_InternFromString("numpy");
};
const Known& known() {
  static const Known all;
  return all;
}

// What one call works with: another thread may replace the network meanwhile.
struct Call {
  std::shared_ptr<const FrozenNetwork> network;
  std::shared_ptr<const DeviceNetwork> on_device;
  bool matrices_only;
  at::Device device = at::kCPU;
  at::ScalarType dtype;  // of input and output
  int64_t in_features, out_features;

  explicit Call(const State& state)
      : network(state.network), on_device(state.on_device), matrices_only(state.matrices_only) {
    if (on_device) {
      device = on_device->device();
      dtype = on_device->dtype();
      in_features = on_device->in_features();
      out_features = on_device->out_features();
    } else {
      dtype = scalar_type_of(network->end_dtype());
      in_features = network->in_features();
      out_features = network->out_features();
    }
  }

  int64_t element() const { return int64_t(c10::elementSize(dtype)); }
};

// If the model has changed, Python's _reload(modules) reads it: its modules, or tensors alone.
void follow_model(PyObject* self, State& state) {
  if (state.watch.empty()) return;
  const Watch::Finding finding = state.watch.look();
  if (finding == Watch::Finding::gone) {
    state.watch = Watch();
    state.stale = false;
  } else if (finding != Watch::Finding::unchanged || state.stale) {
    const bool modules = state.stale || finding == Watch::Finding::other_modules;
    state.stale = true;  // until it was read
    if (!modules) state.watch.renew();
    PyObject* done = PyObject_CallMethodOneArg(self, known().reload, modules ? Py_True : Py_False);
    if (!done) throw py::error_already_set();
    Py_DECREF(done);
  }
}

void follow_isa(State& state) {
  if (!state.network) return;
  const cpu::KernelTable& active = cpu::active();
  if (&state.network->table() != &active) state.network = state.network->packed_for(active);
}

template <class F> void without_gil(const F& f) {
  PyThreadState* const thread = PyEval_SaveThread();
  try {
    f();
  } catch (...) {
    PyEval_RestoreThread(thread);
    throw;
  }
  PyEval_RestoreThread(thread);
}

void run(const Call& call, const InputRows& input, void* output) {
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const auto compute = [&] { call.network->run(input, output, threads); };
  const bool tiny = call.network->multiply_adds() * double(input.count()) < kept_gil;
  tiny ? compute() : without_gil(compute);
}

// Handles of its own: without the GIL others may drop what the caller gave.
void run(const Call& call, const at::Tensor input, const at::Tensor output) {
  without_gil([&] { call.on_device->run(input, output); });
}

// Whether [a, a + bytes) and the elements of a strided input may share memory.
bool overlaps(const char* a, int64_t bytes, const char* data, int64_t element, int dims, const int64_t* sizes,
              const int64_t* steps) {
  int64_t low = 0, high = element;
  for (int d = 0; d < dims; d++) {
    if (sizes[d] == 0) return false;
    (steps[d] < 0 ? low : high) += (sizes[d] - 1) * steps[d];
  }
  return a < data + high && data + low < a + bytes;
}

constexpr int most_dimensions = 64;

// An input as both kinds have it: steps in bytes.
struct View {
  const char* data = nullptr;
  int dims = 0;
  int64_t sizes[most_dimensions], steps[most_dimensions];

  c10::IntArrayRef shape() const { return {sizes, size_t(dims)}; }
  InputRows rows() const { return {data, dims - 1, sizes, steps, steps[dims - 1]}; }
};

void check_shape(const Call& call, const View& x) {
  const int64_t features = call.in_features;
  TORCH_CHECK(x.dims > 0, "fastmlp: input has no dimension, expected at least one, of size in_features");
  TORCH_CHECK(x.sizes[x.dims - 1] == features, "fastmlp: input has shape ", x.shape(), ", expected ", features,
              " in the last dimension, the in_features of the frozen network");
  TORCH_CHECK(!call.matrices_only || x.dims == 2, "fastmlp: input has shape ", x.shape(),
              ", expected two dimensions, since a BatchNorm1d takes its features from the second one");
}

// The shape of the output of x.
View result_of(const Call& call, const View& x) {
  View result;
  result.dims = x.dims;
  std::copy_n(x.sizes, x.dims, result.sizes);
  result.sizes[x.dims - 1] = call.out_features;
  return result;
}

void check_apart(const View& x, const char* out, int64_t out_bytes, int64_t element) {
  TORCH_CHECK(!overlaps(out, out_bytes, x.data, element, x.dims, x.sizes, x.steps),
              "fastmlp: out lies in the memory of input, expected memory of its own");
}

void check_plain(const Call& call, const char* name, PyObject* object) {
  const at::Tensor& tensor = THPVariable_Unpack(object);
  TORCH_CHECK(tensor.defined(), "fastmlp: ", name, " is an undefined tensor");
  TORCH_CHECK(tensor.layout() == at::kStrided, "fastmlp: ", name, " has layout ", tensor.layout(), ", expected ",
              at::kStrided);
  TORCH_CHECK(tensor.device() == call.device, "fastmlp: ", name, " is on ", tensor.device(), ", expected ", call.device,
              ", the device of the frozen network");
  const char* why = obstacle(object, {});
  TORCH_CHECK(!why, "fastmlp: a frozen network takes plain tensors, outside of transforms and modes, but ", why,
              "; call the model that it was made from");
}

void check_dtype(const Call& call, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.scalar_type() == call.dtype, "fastmlp: ", name, " has dtype ", tensor.scalar_type(), ", expected ",
              call.dtype, ", the dtype of the frozen network");
}

PyObject* call_tensor(const Call& call, PyObject* object, PyObject* out) {
  const at::Tensor& input = THPVariable_Unpack(object);
  check_dtype(call, "input", input);
  const auto is_there = [&](PyObject* tensor) { return THPVariable_Unpack(tensor).device() == call.device; };
  const bool plain = !obstacle(object, out ? c10::ArrayRef<PyObject*>(out) : c10::ArrayRef<PyObject*>()) &&
                     is_there(object) && (!out || is_there(out));
  if (!plain) {
    check_plain(call, "input", object);
    if (out) check_plain(call, "out", out);
  }
  TORCH_CHECK(!(input.requires_grad() && c10::GradMode::is_enabled()),
              "fastmlp: input requires grad, but a frozen network has no gradients; pass input.detach(), or call it "
              "under torch.no_grad()");
  View x;
  x.dims = int(input.dim());
  TORCH_CHECK(x.dims <= most_dimensions, "fastmlp: input has ", x.dims, " dimensions, expected at most ",
              most_dimensions);
  const int64_t element = input.element_size();
  for (int d = 0; d < x.dims; d++) {
    x.sizes[d] = input.size(d);
    x.steps[d] = input.stride(d) * element;
  }
  check_shape(call, x);
  x.data = static_cast<const char*>(input.const_data_ptr());
  const View result = result_of(call, x);
  if (!out && call.on_device) {
    at::Tensor output = call.on_device->empty(result.shape());
    run(call, input, output);
    return THPVariable_Wrap(std::move(output));
  }
  if (!out) {
    // Past the dispatcher, which would find the same.
    at::Tensor output = at::detail::empty_cpu(result.shape(), input.scalar_type());
    void* const data = output.data_ptr();
    cpu::prefer_huge_pages(data, output.nbytes());
    run(call, x.rows(), data);
    return THPVariable_Wrap(std::move(output));
  }
  const at::Tensor& output = THPVariable_Unpack(out);
  check_dtype(call, "out", output);
  TORCH_CHECK(output.sizes() == result.shape(), "fastmlp: out has shape ", output.sizes(), ", expected ",
              result.shape());
  TORCH_CHECK(output.is_contiguous(), "fastmlp: out has strides ", output.strides(), ", expected a contiguous tensor");
  TORCH_CHECK(!(output.requires_grad() && c10::GradMode::is_enabled()),
              "fastmlp: out requires grad, but a frozen network has no gradients");
  TORCH_CHECK(!output.is_inference() || c10::InferenceMode::is_enabled(),
              "fastmlp: out is an inference tensor, which may be written in torch.inference_mode() only");
  void* const data = output.mutable_data_ptr();
  check_apart(x, static_cast<const char*>(data), int64_t(output.nbytes()), element);
  if (!output.is_inference()) output.unsafeGetTensorImpl()->bump_version();
  call.on_device ? run(call, input, output) : run(call, x.rows(), data);
  return Py_NewRef(out);
}

// NumPy arrays.

using Array = py::detail::PyArray_Proxy;

const py::detail::npy_api* numpy() {
  static const py::detail::npy_api* api = nullptr;
  if (!api) {
    // Where nobody has imported NumPy no object is of it.
    PyObject* const module = PyImport_GetModule(known().numpy);
    if (!module) {
      if (PyErr_Occurred()) throw py::error_already_set();
      return nullptr;
    }
    Py_DECREF(module);
    api = &py::detail::npy_api::get();
  }
  return api;
}

bool is_array(PyObject* object) {
  const py::detail::npy_api* api = numpy();
  return api && Py_TYPE(object) == api->PyArray_Type_;
}

constexpr int numpy_half = 23;  // NPY_HALF, which pybind11 does not list

int numpy_type(const Call& call) {
  switch (call.dtype) {
    case at::kFloat:
      return py::detail::npy_api::NPY_FLOAT_;
    case at::kDouble:
      return py::detail::npy_api::NPY_DOUBLE_;
    case at::kHalf:
      return numpy_half;
    default:
      break;
  }
  TORCH_CHECK_TYPE(false,
                   "fastmlp: the frozen network has dtype bfloat16, which NumPy lacks; pass a tensor, or freeze with "
                   "dtype=torch.bfloat16, whose input and output are float32");
}

const Array& array_of(PyObject* object) { return *reinterpret_cast<const Array*>(object); }

void check_numpy_dtype(const Call& call, const char* name, PyObject* object) {
  const auto* descr = reinterpret_cast<const py::detail::PyArrayDescr_Proxy*>(array_of(object).descr);
  const int expected = numpy_type(call);
  if (descr->type_num == expected && (descr->byteorder == '=' || descr->byteorder == '|')) return;
  const auto own = py::reinterpret_borrow<py::object>(array_of(object).descr);
  TORCH_CHECK(false, "fastmlp: ", name, " has dtype ", py::str(own).cast<std::string>(), ", expected ",
              py::str(py::dtype(expected)).cast<std::string>(),
              " in native byte order, the dtype of the frozen network");
}

View view_of(PyObject* object) {
  const Array& array = array_of(object);
  View view;
  view.data = array.data;
  view.dims = array.nd;
  for (int d = 0; d < array.nd; d++) {
    view.sizes[d] = array.dimensions[d];
    view.steps[d] = array.strides[d];
  }
  return view;
}

PyObject* call_array(const Call& call, PyObject* object, PyObject* out) {
  using py::detail::npy_api;
  check_numpy_dtype(call, "input", object);
  TORCH_CHECK(array_of(object).nd <= most_dimensions, "fastmlp: input has ", array_of(object).nd,
              " dimensions, expected at most ", most_dimensions);
  const View x = view_of(object);
  check_shape(call, x);
  const View result = result_of(call, x);
  py::object made;
  if (!out) {
    const npy_api& api = *numpy();
    Py_intptr_t sizes[most_dimensions];
    std::copy_n(result.sizes, result.dims, sizes);
    made = py::reinterpret_steal<py::object>(
        api.PyArray_NewFromDescr_(api.PyArray_Type_, api.PyArray_DescrFromType_(numpy_type(call)), result.dims, sizes,
                                  nullptr, nullptr, 0, nullptr));
    if (!made) throw py::error_already_set();
    run(call, x.rows(), array_of(made.ptr()).data);
    return made.release().ptr();
  }
  check_numpy_dtype(call, "out", out);
  const Array& array = array_of(out);
  const View y = view_of(out);
  TORCH_CHECK(y.shape() == result.shape(), "fastmlp: out has shape ", y.shape(), ", expected ", result.shape());
  const auto needs = [&](int flag, const char* what) {
    TORCH_CHECK((array.flags & flag) != 0, "fastmlp: out is not ", what, ", expected an array that is");
  };
  needs(npy_api::NPY_ARRAY_C_CONTIGUOUS_, "contiguous");
  needs(npy_api::NPY_ARRAY_ALIGNED_, "aligned");
  needs(npy_api::NPY_ARRAY_WRITEABLE_, "writeable");
  check_apart(x, array.data, c10::multiply_integers(y.shape()) * call.element(), call.element());
  run(call, x.rows(), array.data);
  return Py_NewRef(out);
}

PyObject* call_checked(PyObject* self, PyObject* args, PyObject* kwargs) {
  PyObject* given[2] = {};
  const Py_ssize_t count = PyTuple_GET_SIZE(args);
  TORCH_CHECK_TYPE(count <= 2, "fastmlp: a frozen network takes input and out, got ", count, " arguments");
  for (Py_ssize_t i = 0; i < count; i++) given[i] = PyTuple_GET_ITEM(args, i);
  if (kwargs) {
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(kwargs, &at, &key, &value);) {
      const int i = PyUnicode_Compare(key, known().input) == 0 ? 0 : PyUnicode_Compare(key, known().out) == 0 ? 1 : 2;
      TORCH_CHECK_TYPE(i < 2 && !given[i], "fastmlp: a frozen network takes input and out, each once, got the keyword ",
                       py::repr(key).cast<std::string>());
      given[i] = value;
    }
  }
  PyObject* const input = given[0];
  PyObject* const out = given[1] == Py_None ? nullptr : given[1];
  TORCH_CHECK_TYPE(input, "fastmlp: a frozen network takes an input, got none");
  State& state = *reinterpret_cast<Frozen*>(self)->state;
  check_filled(state);
  follow_model(self, state);
  follow_isa(state);
  const Call call(state);
  const auto of_same_kind = [&](bool same) {
    TORCH_CHECK_TYPE(!out || same, "fastmlp: out is a ", Py_TYPE(out)->tp_name, ", expected the kind of input, ",
                     Py_TYPE(input)->tp_name);
  };
  if (THPVariable_Check(input)) {
    of_same_kind(out && THPVariable_Check(out));
    return call_tensor(call, input, out);
  }
  TORCH_CHECK_TYPE(is_array(input), "fastmlp: input must be a torch.Tensor or exactly a numpy.ndarray, got ",
                   Py_TYPE(input)->tp_name);
  of_same_kind(out && is_array(out));
  TORCH_CHECK_TYPE(!call.on_device, "fastmlp: input is a numpy.ndarray, but the frozen network is on ", call.device,
                   "; pass a tensor of that device");
  return call_array(call, input, out);
}

// Errors of C++ as Python's.
template <class F> PyObject* guarded(const F& f) {
  try {
    return f();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
  }
  return nullptr;
}

PyObject* call(PyObject* self, PyObject* args, PyObject* kwargs) {
  return guarded([&] { return call_checked(self, args, kwargs); });
}

PyObject* create(PyTypeObject* type, PyObject*, PyObject*) {
  return guarded([&]() -> PyObject* {
    PyObject* self = type->tp_alloc(type, 0);
    if (self) reinterpret_cast<Frozen*>(self)->state = new State();
    return self;
  });
}

void destroy(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  delete reinterpret_cast<Frozen*>(self)->state;
  type->tp_free(self);
  Py_DECREF(type);
}

// What fastmlp/frozen.py calls, rarely.

using Biases = std::vector<std::optional<at::Tensor>>;

std::vector<bool> has_bias(const Biases& biases) {
  std::vector<bool> all;
  for (const auto& bias : biases) all.push_back(bias.has_value());
  return all;
}

void load(const py::handle& self, const Tensors& weights, const Biases& biases, const std::vector<int64_t>& kinds,
          const std::vector<double>& scalars, bool float32_ends, bool matrices_only) {
  const Stack stack(has_bias(biases), kinds, scalars);
  TORCH_CHECK(weights.size() == stack.layers(), "fastmlp: expected a weight for each layer");
  Network network;
  const at::ScalarType type = weights[0].scalar_type();
  const at::ScalarType sums = c10::elementSize(type) == 2 ? at::kFloat : type;
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    if (scalar_type_of(dtype) == type) network.dtype = dtype;
  }
  TORCH_CHECK(scalar_type_of(network.dtype) == type, "fastmlp: weights have dtype ", type);
  for (size_t l = 0; l < weights.size(); l++) {
    const at::Tensor& weight = weights[l];
    TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == type && weight.device().is_cpu(), "fastmlp: weights[", l,
                "] must be a matrix on the CPU, all of one dtype");
    Layer& layer = network.layers.emplace_back();
    layer.in_features = weight.size(1);
    layer.out_features = weight.size(0);
    TORCH_CHECK(l == 0 || layer.in_features == weights[l - 1].size(0), "fastmlp: weights[", l, "] has shape ",
                weight.sizes(), ", expected ", weights[l - 1].size(0), " in the last dimension");
    layer.weight = {weight.data_ptr(), weight.stride(0), weight.stride(1)};
    layer.activation = stack.activation(l);
    if (!biases[l]) continue;
    const at::Tensor& bias = *biases[l];
    TORCH_CHECK(bias.dim() == 1 && bias.size(0) == layer.out_features, "fastmlp: biases[", l, "] has shape ",
                bias.sizes(), ", expected [", layer.out_features, "], the out_features of weights[", l, "]");
    TORCH_CHECK(bias.scalar_type() == sums && bias.device().is_cpu(), "fastmlp: biases[", l, "] must be ", sums,
                " on the CPU");
    layer.bias = {bias.data_ptr(), bias.stride(0)};
  }
  State& state = state_of(self.ptr());
  state.network = FrozenNetwork::pack(cpu::active(), network, float32_ends);
  state.on_device.reset();
  state.matrices_only = matrices_only;
  state.stale = false;
}

// The same for another device than the CPU, with biases of the weights' dtype.
void load_on_device(const py::handle& self, const Tensors& weights, const Biases& biases,
                    const std::vector<int64_t>& kinds, const std::vector<double>& scalars, bool matrices_only) {
  const Stack stack(has_bias(biases), kinds, scalars);
  TORCH_CHECK(weights.size() == stack.layers(), "fastmlp: expected a weight for each layer");
  Tensors parameters;
  for (size_t l = 0; l < weights.size(); l++) {
    parameters.push_back(weights[l]);
    if (biases[l]) parameters.push_back(*biases[l]);
  }
  State& state = state_of(self.ptr());
  if (!state.on_device || !state.on_device->refill(stack, parameters))
    state.on_device = std::make_shared<DeviceNetwork>(stack, parameters);
  state.network.reset();
  state.matrices_only = matrices_only;
  state.stale = false;
}

py::tuple unload(const py::handle& self) {
  const State& state = state_of(self.ptr());
  check_filled(state);
  Tensors weights;
  Biases biases;
  std::vector<int64_t> kinds;
  std::vector<double> scalars;
  const auto add_activation = [&](const ActivationSpec& activation) {
    kinds.push_back(activation.kind);
    scalars.insert(scalars.end(), {activation.scalars.a, activation.scalars.b});
  };
  if (state.on_device) {
    const Stack& stack = state.on_device->stack();
    const Tensors& parameters = state.on_device->parameters();
    for (size_t l = 0; l < stack.layers(); l++) {
      weights.push_back(parameters[stack.weight(l)]);
      biases.push_back(stack.has_bias(l) ? std::optional(parameters[stack.bias(l)]) : std::nullopt);
      add_activation(stack.activation(l));
    }
    return py::make_tuple(weights, biases, kinds, scalars, false, state.matrices_only);
  }
  const FrozenNetwork& network = *state.network;
  const at::ScalarType type = scalar_type_of(network.dtype());
  for (size_t l = 0; l < network.layers().size(); l++) {
    const cpu::FrozenLayer& layer = network.layers()[l];
    weights.push_back(at::empty({layer.out_features, layer.in_features}, type));
    biases.emplace_back();
    if (layer.has_bias)
      biases.back() = at::empty({layer.out_features}, c10::elementSize(type) == 2 ? at::kFloat : type);
    network.unpack(l, weights.back().data_ptr(), layer.has_bias ? biases.back()->data_ptr() : nullptr);
    add_activation(layer.activation);
  }
  return py::make_tuple(weights, biases, kinds, scalars, network.float32_ends(), state.matrices_only);
}

}  // namespace

void add_frozen(py::module_& module) {
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(&create)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(&destroy)},
                                {Py_tp_call, reinterpret_cast<void*>(&call)},
                                {0, nullptr}};
  static PyType_Spec spec = {"fastmlp._C.Frozen", int(sizeof(Frozen)), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
                             slots};
  const auto type = py::reinterpret_steal<py::object>(PyType_FromSpec(&spec));
  if (!type) throw py::error_already_set();
  frozen_type = reinterpret_cast<PyTypeObject*>(type.ptr());
  module.attr("Frozen") = type;
  // Functions of the module and not methods: only calls have to be fast.
  module.def("load_frozen", &load);
  module.def("load_frozen_on_device", &load_on_device);
  module.def("unload_frozen", &unload);
  module.def("watch_frozen", [](const py::handle& self, const py::list& modules) {
    state_of(self.ptr()).watch = Watch(modules);
    state_of(self.ptr()).stale = true;
  });
  module.def("frozen_bytes", [](const py::handle& self) {
    const State& state = state_of(self.ptr());
    check_filled(state);
    return state.on_device ? state.on_device->bytes() : state.network->bytes();
  });
}

}  // namespace fastmlp

// Tensors and NumPy arrays -> FrozenNetwork::run. A class of the C API, because a call through it costs a third of one
// through pybind11. Takes the arguments of a call apart and lets the network follow its model; frozen_tensor.cpp,
// frozen_array.cpp and, of graphs, frozen_graph_call.cpp check the rest before anything is written. Must name no
// device: the network knows its own.
#include "frozen.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <new>
#include <string>
#include <utility>

#include "../tensors/dtypes.h"
#include "../tensors/flattened.h"
#include "frozen_call.h"
#include "gil.h"
#include "objects.h"

namespace fastmlp {
namespace frozen {
namespace {

struct Frozen {
  PyObject object;  // first, for Python
  State* state;
};

PyTypeObject* frozen_type = nullptr;

// If the model has changed, Python's _reload(watch) reads it: with a watch that knows its modules, or with None if they
// are others by now. It fills the network again, or raises and leaves it as it is: then the next call tries again.
void follow_model(PyObject* self, State& state) {
  if (!state.watch) return;
  const Watch::Finding finding = state.watch->look();
  if (finding == Watch::Finding::unchanged) return;
  if (finding == Watch::Finding::gone) {
    state.watch.reset();
    return;
  }
  const py::object watch =
      finding == Watch::Finding::other_values ? py::cast(std::make_shared<Watch>(*state.watch)) : py::none();
  const auto done = py::reinterpret_steal<py::object>(PyObject_CallMethodOneArg(self, names().reload, watch.ptr()));
  if (!done) throw py::error_already_set();
}

// If another instruction set was chosen since the network was made.
void follow_isa(State& state) {
  if (state.graph) {
    if (auto renewed = state.graph->renewed()) state.graph = std::move(renewed);
  } else if (auto renewed = state.network->renewed()) {
    state.network = std::move(renewed);
  }
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

}  // namespace

State& state_of(PyObject* self) {
  TORCH_CHECK_TYPE(PyObject_TypeCheck(self, frozen_type), "fastmlp: expected a FrozenMLP, got ",
                   Py_TYPE(self)->tp_name);
  return *reinterpret_cast<Frozen*>(self)->state;
}

void check_filled(const State& state) {
  TORCH_CHECK(state.network || state.graph,
              "fastmlp: this FrozenMLP holds no network; fastmlp.freeze makes one that does");
}

void follow(PyObject* self, State& state) {
  follow_model(self, state);
  follow_isa(state);
}

void check_dimensions(int64_t dimensions) {
  TORCH_CHECK(dimensions <= View::most_dimensions, "fastmlp: input has ", dimensions, " dimensions, expected at most ",
              int(View::most_dimensions));
}

void check_shape(const Call& call, const View& x) {
  const int64_t features = call.network->form().in_features();
  if (call.flattens) return check_flattened(x.shape(), features, "the frozen network");
  TORCH_CHECK(x.dims > 0, "fastmlp: input has no dimension, expected at least one, of size in_features");
  TORCH_CHECK(x.sizes[x.dims - 1] == features, "fastmlp: input has shape ", x.shape(), ", expected ", features,
              " in the last dimension, the in_features of the frozen network");
  TORCH_CHECK(!call.matrices_only || x.dims == 2, "fastmlp: input has shape ", x.shape(),
              ", expected two dimensions, since a BatchNorm1d or a softmax of the model takes the second one as its "
              "features");
}

// The shape of the output of x.
View result_of(const Call& call, const View& x) {
  View result;
  result.dims = call.flattens ? 2 : x.dims;
  std::copy_n(x.sizes, result.dims, result.sizes);
  result.sizes[result.dims - 1] = call.network->form().out_features();
  if (!call.reshapings) return result;
  at::DimVector shape(size_t(result.dims), 0);
  std::copy_n(result.sizes, result.dims, shape.begin());
  for (const Reshaping& reshaping : *call.reshapings) reshaping.apply(shape);
  TORCH_CHECK(shape.size() <= View::most_dimensions, "fastmlp: the output would have ", shape.size(),
              " dimensions, expected at most ", int(View::most_dimensions));
  result.dims = int(shape.size());
  std::copy(shape.begin(), shape.end(), result.sizes);
  return result;
}

void check_apart(const View& x, const char* out, int64_t out_bytes, int64_t element) {
  TORCH_CHECK(!overlaps(out, out_bytes, x.data, element, x.dims, x.sizes, x.steps),
              "fastmlp: out lies in the memory of input, expected memory of its own");
}

std::string dtype_remedy(const Call& call, at::ScalarType given, const std::string& convert) {
  const bool float32_ends = call.network->form().dtype != call.dtype();
  const bool or_model = dtype_of(given) && given != call.dtype() && !float32_ends;
  return "; pass " + convert + (or_model ? ", or freeze model" + cast_to(given) : "");
}

ReleasedGil release_for(const Call& call, int64_t rows) {
  return ReleasedGil(call.network->form().multiply_adds * double(rows) > worth_releasing);
}

void run_on_host(const Call& call, const View& x, void* output) {
  if (!call.flattens) {
    const ReleasedGil released = release_for(call, x.rows());
    return call.network->run({x, output});
  }
  const ReleasedGil released = release_for(call, x.sizes[0]);
  const FlatRows rows(x, call.network->form().in_features(), call.element());
  call.network->run({rows.view(), output});
}

namespace {

PyObject* call_checked(PyObject* self, PyObject* args, PyObject* kwargs) {
  State& state = *reinterpret_cast<Frozen*>(self)->state;
  if (state.graph) {
    follow(self, state);
    if (state.graph) return call_graph(state, args, kwargs);
  }
  PyObject* given[2] = {};
  const Py_ssize_t count = PyTuple_GET_SIZE(args);
  TORCH_CHECK_TYPE(count <= 2, "fastmlp: a frozen network takes input and out, got ", count, " arguments");
  for (Py_ssize_t i = 0; i < count; i++) given[i] = PyTuple_GET_ITEM(args, i);
  if (kwargs) {
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(kwargs, &at, &key, &value);) {
      const int i = PyUnicode_Compare(key, names().input) == 0 ? 0 : PyUnicode_Compare(key, names().out) == 0 ? 1 : 2;
      TORCH_CHECK_TYPE(i < 2 && !given[i], "fastmlp: a frozen network takes input and out, each once, got the keyword ",
                       py::repr(key).cast<std::string>());
      given[i] = value;
    }
  }
  PyObject* const input = given[0];
  PyObject* const out = given[1] == Py_None ? nullptr : given[1];
  TORCH_CHECK_TYPE(input, "fastmlp: a frozen network takes an input, got none");
  check_filled(state);
  follow(self, state);
  if (state.graph) return call_graph(state, args, kwargs);
  const Call call(state);
  const auto of_same_kind = [&](bool same) {
    TORCH_CHECK_TYPE(!out || same, "fastmlp: out is of type ", Py_TYPE(out)->tp_name, ", expected the kind of input, ",
                     Py_TYPE(input)->tp_name);
  };
  if (THPVariable_Check(input)) {
    of_same_kind(out && THPVariable_Check(out));
    return call_tensor(call, input, out);
  }
  TORCH_CHECK_TYPE(is_array(input), "fastmlp: input must be a torch.Tensor or exactly a numpy.ndarray, got ",
                   Py_TYPE(input)->tp_name);
  of_same_kind(out && is_array(out));
  TORCH_CHECK_TYPE(call.network->form().takes_arrays,
                   "fastmlp: input is a numpy.ndarray, but the frozen network is on ", call.device(),
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

}  // namespace
}  // namespace frozen

void add_frozen(py::module_& module) {
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(&frozen::create)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(&frozen::destroy)},
                                {Py_tp_call, reinterpret_cast<void*>(&frozen::call)},
                                {0, nullptr}};
  static PyType_Spec spec = {"fastmlp._C.Frozen", int(sizeof(frozen::Frozen)), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};
  const auto type = py::reinterpret_steal<py::object>(PyType_FromSpec(&spec));
  if (!type) throw py::error_already_set();
  frozen::frozen_type = reinterpret_cast<PyTypeObject*>(type.ptr());
  module.attr("Frozen") = type;
  frozen::add_loading(module);
  frozen::add_loading_of_graphs(module);
}

}  // namespace fastmlp

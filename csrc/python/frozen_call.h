// What one call of a frozen network works with, whether its input is a tensor or an array: frozen.cpp takes the call
// apart and hands it to frozen_tensor.cpp or frozen_array.cpp, and frozen_load.cpp fills the network. Everything here
// needs the GIL. Must not check dtypes or devices, because only the kind of the input knows its words for them.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../capture/frozen_graph.h"
#include "../tensors/frozen_network.h"
#include "../tensors/reshaping.h"
#include "frozen_watch.h"
#include "gil.h"

namespace fastmlp::frozen {

// A network, or none yet, and the watch of the model that was begun before the network was read from it. They are
// replaced together and under the GIL: however many threads read the model at once, a network never stands beside a
// watch that saw the model later.
struct State {
  std::shared_ptr<FrozenNetwork> network;        // of a chain, or
  std::shared_ptr<FrozenGraph> graph;            // of a graph
  py::object recipe;                             // what the graph was loaded from, besides tensors
  bool matrices_only = false;                    // inputs must have two dimensions
  bool flattens = false;                         // inputs are flattened to two dimensions, whatever they have
  std::shared_ptr<const Reshapings> reshapings;  // of outputs of a chain; null if there are none
  std::shared_ptr<Watch> watch;                  // null if there is no model to follow
};

// Raises TypeError for an object that is no FrozenMLP.
State& state_of(PyObject* self);
// Raises RuntimeError if there is no network.
void check_filled(const State& state);
// Brings the network up to what its model and the instruction set are now; may run code of Python.
void follow(PyObject* self, State& state);

// Another thread may replace the network during a call, which goes on with the one that it began with.
struct Call {
  const std::shared_ptr<const FrozenNetwork> network;
  const bool matrices_only, flattens;
  const std::shared_ptr<const Reshapings> reshapings;

  explicit Call(const State& state)
      : network(state.network),
        matrices_only(state.matrices_only),
        flattens(state.flattens),
        reshapings(state.reshapings) {}
  // Of a graph: a network of its, whose dtype and device are those of all.
  Call(const FrozenGraph& graph, bool matrices_only)
      : network(graph.networks().front()), matrices_only(matrices_only), flattens(false), reshapings(nullptr) {}
  at::Device device() const { return network->form().device; }
  at::ScalarType dtype() const { return network->form().end_dtype; }  // of input and output
  int64_t element() const { return int64_t(c10::elementSize(dtype())); }
};

using View = StridedView;

void check_dimensions(int64_t dimensions);
void check_shape(const Call& call, const View& x);
// Raises if `out_bytes` at `out` may share memory with the elements of x.
void check_apart(const View& x, const char* out, int64_t out_bytes, int64_t element);
// The shape of the output of x.
View result_of(const Call& call, const View& x);

// What to do about an argument of another dtype: `convert` is the call that gives it the network's.
std::string dtype_remedy(const Call& call, at::ScalarType given, const std::string& convert);

// Gives up the GIL during a computation with so many rows, unless that would take longer than the work.
ReleasedGil release_for(const Call& call, int64_t rows);
// Computes from memory of the host, flattening the input if the network does. For an output of the shape result_of(x).
void run_on_host(const Call& call, const View& x, void* output);

// Calls with a tensor and with an array; `out` may be null. Both return a new reference.
PyObject* call_tensor(const Call& call, PyObject* input, PyObject* out);
PyObject* call_array(const Call& call, PyObject* input, PyObject* out);
bool is_array(PyObject* object);
// The same of a graph, with the arguments of the call.
PyObject* call_graph(const State& state, PyObject* args, PyObject* kwargs);

// What calls of chains and of graphs check alike. `name`: of the argument, for errors.
struct TensorArgument {
  const std::string& name;
  PyObject* object;
};
// Raises unless these are plain tensors of the network's dtype and device, outside of transforms and modes.
void check_tensors(const Call& call, c10::ArrayRef<TensorArgument> inputs, c10::ArrayRef<TensorArgument> outs);
View view_of_tensor(PyObject* input);
// The memory of an `out` that may be written, of this shape.
void* memory_of_tensor(const TensorArgument& out, c10::IntArrayRef shape);
// Counts a change of the tensor.
void count_change(PyObject* out);

View view_of_array(const Call& call, const std::string& name, PyObject* input);
py::object new_array(const Call& call, const View& result);
void* memory_of_array(const Call& call, const std::string& name, PyObject* out, c10::IntArrayRef shape);
void* memory_of_new_array(const py::object& array);

// A network of checked layers, in the form that its device has for it.
std::shared_ptr<FrozenNetwork> network_of(const std::vector<at::Tensor>& weights,
                                          const std::vector<std::optional<at::Tensor>>& biases,
                                          const std::vector<int64_t>& activations, const std::vector<double>& scalars,
                                          const FrozenEnds& ends);
// Up to date with the model, as a call is. Without a network there is nothing to follow, or to read.
const State& followed(const py::handle& self);

// Adds the functions that fill a network and read it, those of graphs apart.
void add_loading(py::module_& module);
void add_loading_of_graphs(py::module_& module);

}  // namespace fastmlp::frozen

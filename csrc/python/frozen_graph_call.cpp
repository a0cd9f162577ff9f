// A frozen graph called with tensors or arrays: takes the arguments apart and checks them, before anything is written.
// Called by frozen.cpp with the GIL, after the network has followed its model.
#include <torch/csrc/autograd/python_variable.h>

#include <string>
#include <utility>
#include <vector>

#include "frozen_call.h"
#include "gil.h"
#include "objects.h"

namespace fastmlp::frozen {
namespace {

using Objects = std::vector<PyObject*>;

struct Arguments {
  Objects inputs, outs;  // outs: one for each output, or none
  std::vector<std::string> input_names, out_names;
  PyObject* out = nullptr;  // as it was given
};

std::vector<std::string> names_of(const char* name, size_t count) {
  if (count == 1) return {name};
  std::vector<std::string> all;
  for (size_t i = 0; i < count; i++) all.push_back(std::string(name) + '[' + std::to_string(i) + ']');
  return all;
}

// Positions: the inputs, then `out`; a single input may be given by keyword too.
Arguments arguments_of(const FrozenGraph& graph, PyObject* args, PyObject* kwargs) {
  const size_t inputs = graph.inputs().size(), outputs = graph.outputs().size();
  Objects given(inputs + 1, nullptr);
  const size_t count = size_t(PyTuple_GET_SIZE(args));
  TORCH_CHECK_TYPE(count <= given.size(), "fastmlp: the frozen network takes ", inputs,
                   inputs == 1 ? " input" : " inputs", " and out, got ", count, " arguments");
  for (size_t i = 0; i < count; i++) given[i] = PyTuple_GET_ITEM(args, Py_ssize_t(i));
  if (kwargs) {
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(kwargs, &at, &key, &value);) {
      const bool is_out = PyUnicode_Compare(key, names().out) == 0;
      const bool is_input = inputs == 1 && PyUnicode_Compare(key, names().input) == 0;
      PyObject*& place = given[is_out ? inputs : 0];
      TORCH_CHECK_TYPE((is_out || is_input) && !place, "fastmlp: the frozen network takes ",
                       inputs == 1 ? "input" : "its inputs by position", " and out, each once, got the keyword ",
                       py::repr(key).cast<std::string>());
      place = value;
    }
  }
  Arguments all;
  all.input_names = names_of("input", inputs);
  all.out_names = names_of("out", outputs);
  all.out = given.back() == Py_None ? nullptr : given.back();
  given.pop_back();
  for (size_t i = 0; i < inputs; i++)
    TORCH_CHECK_TYPE(given[i], "fastmlp: the frozen network takes ", inputs, inputs == 1 ? " input" : " inputs",
                     ", got ", i);
  all.inputs = std::move(given);
  if (!all.out) return all;
  if (outputs == 1) {
    all.outs = {all.out};
    return all;
  }
  TORCH_CHECK_TYPE(PyTuple_Check(all.out), "fastmlp: out must be a tuple of ", outputs, ", got ",
                   Py_TYPE(all.out)->tp_name);
  const auto items = items_of(all.out);
  TORCH_CHECK(items.size() == outputs, "fastmlp: out is a tuple of ", items.size(), ", expected one of ", outputs);
  all.outs = items.vec();
  return all;
}

// All of one kind. Whether that is tensors; else arrays.
bool are_tensors(const Arguments& all) {
  const bool tensors = THPVariable_Check(all.inputs.front());
  const auto check = [&](const Objects& objects, const std::vector<std::string>& names, bool is_out) {
    for (size_t i = 0; i < objects.size(); i++) {
      const char* const type = Py_TYPE(objects[i])->tp_name;
      const bool known = THPVariable_Check(objects[i]) || is_array(objects[i]);
      TORCH_CHECK_TYPE(known || is_out, "fastmlp: ", names[i],
                       " must be a torch.Tensor or exactly a numpy.ndarray, got ", type);
      TORCH_CHECK_TYPE(known && THPVariable_Check(objects[i]) == tensors, "fastmlp: ", names[i], " is of type ", type,
                       ", expected the kind of ", all.input_names.front(), ", ", Py_TYPE(all.inputs.front())->tp_name);
    }
  };
  check(all.inputs, all.input_names, false);
  check(all.outs, all.out_names, true);
  return tensors;
}

void check_shapes(const Call& call, const FrozenGraph& graph, const std::vector<View>& views, const Arguments& all) {
  for (size_t i = 0; i < views.size(); i++) {
    const View &x = views[i], &first = views.front();
    const int64_t features = graph.inputs()[i];
    const std::string& name = all.input_names[i];
    TORCH_CHECK(x.dims > 0, "fastmlp: ", name, " has no dimension, expected at least one, of ", features, " features");
    TORCH_CHECK(x.sizes[x.dims - 1] == features, "fastmlp: ", name, " has shape ", x.shape(), ", expected ", features,
                " in the last dimension, the features that the model takes there");
    TORCH_CHECK(!call.matrices_only || x.dims == 2, "fastmlp: ", name, " has shape ", x.shape(),
                ", expected two dimensions, since the model counts dimensions from the first, or has a BatchNorm1d");
    TORCH_CHECK(x.dims == first.dims && std::equal(x.sizes, x.sizes + x.dims - 1, first.sizes), "fastmlp: ", name,
                " has shape ", x.shape(), ", expected that of ", all.input_names.front(), ", ", first.shape(),
                ", in all dimensions but the last");
  }
}

std::vector<View> results_of(const FrozenGraph& graph, const View& x) {
  std::vector<View> all;
  for (size_t k = 0; k < graph.outputs().size(); k++) {
    View result;
    result.dims = x.dims - int(graph.form().squeezed[k]);
    std::copy_n(x.sizes, x.dims, result.sizes);
    result.sizes[x.dims - 1] = graph.outputs()[k];
    all.push_back(result);
  }
  return all;
}

void run(const FrozenGraph& graph, const std::vector<View>& inputs, const std::vector<void*>& outputs) {
  const ReleasedGil released(graph.multiply_adds() * double(inputs.front().rows()) > worth_releasing);
  graph.run(inputs, outputs);
}

// That no output shares memory with an input, or with another output.
void check_memory(const Call& call, const std::vector<View>& inputs, const std::vector<View>& results,
                  const std::vector<void*>& outputs, const Arguments& all) {
  for (size_t k = 0; k < outputs.size(); k++) {
    const auto* const data = static_cast<const char*>(outputs[k]);
    const int64_t bytes = c10::multiply_integers(results[k].shape()) * call.element();
    for (const View& x : inputs) check_apart(x, data, bytes, call.element());
    for (size_t j = 0; j < k; j++) {
      const auto* const other = static_cast<const char*>(outputs[j]);
      const int64_t of_other = c10::multiply_integers(results[j].shape()) * call.element();
      TORCH_CHECK(data + bytes <= other || other + of_other <= data, "fastmlp: ", all.out_names[k],
                  " lies in the memory of ", all.out_names[j], ", expected memory of its own");
    }
  }
}

PyObject* returned(std::vector<py::object> objects) {
  if (objects.size() == 1) return objects.front().release().ptr();
  py::tuple all(objects.size());
  for (size_t k = 0; k < objects.size(); k++) all[k] = std::move(objects[k]);
  return all.release().ptr();
}

PyObject* call_tensors(const FrozenGraph& graph, const Call& call, const Arguments& all) {
  std::vector<TensorArgument> inputs, outs;
  for (size_t i = 0; i < all.inputs.size(); i++) inputs.push_back({all.input_names[i], all.inputs[i]});
  for (size_t k = 0; k < all.outs.size(); k++) outs.push_back({all.out_names[k], all.outs[k]});
  check_tensors(call, inputs, outs);
  std::vector<View> views;
  for (const TensorArgument& input : inputs) views.push_back(view_of_tensor(input.object));
  check_shapes(call, graph, views, all);
  const std::vector<View> results = results_of(graph, views.front());
  std::vector<void*> memory;
  if (all.out) {
    for (size_t k = 0; k < outs.size(); k++) memory.push_back(memory_of_tensor(outs[k], results[k].shape()));
    check_memory(call, views, results, memory, all);
    for (const TensorArgument& out : outs) count_change(out.object);
    run(graph, views, memory);
    return Py_NewRef(all.out);
  }
  std::vector<at::Tensor> made;
  for (const View& result : results) {
    made.push_back(call.network->empty(result.shape()));
    memory.push_back(made.back().data_ptr());
  }
  run(graph, views, memory);
  std::vector<py::object> objects;
  for (at::Tensor& tensor : made) objects.push_back(py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)));
  return returned(std::move(objects));
}

PyObject* call_arrays(const FrozenGraph& graph, const Call& call, const Arguments& all) {
  std::vector<View> views;
  for (size_t i = 0; i < all.inputs.size(); i++)
    views.push_back(view_of_array(call, all.input_names[i], all.inputs[i]));
  check_shapes(call, graph, views, all);
  const std::vector<View> results = results_of(graph, views.front());
  std::vector<void*> memory;
  if (all.out) {
    for (size_t k = 0; k < all.outs.size(); k++)
      memory.push_back(memory_of_array(call, all.out_names[k], all.outs[k], results[k].shape()));
    check_memory(call, views, results, memory, all);
    run(graph, views, memory);
    return Py_NewRef(all.out);
  }
  std::vector<py::object> made;
  for (const View& result : results) {
    made.push_back(new_array(call, result));
    memory.push_back(memory_of_new_array(made.back()));
  }
  run(graph, views, memory);
  return returned(std::move(made));
}

}  // namespace

PyObject* call_graph(const State& state, PyObject* args, PyObject* kwargs) {
  // Another thread may replace the graph during the call, which goes on with the one that it began with.
  const std::shared_ptr<const FrozenGraph> graph = state.graph;
  const Call call(*graph, state.matrices_only);
  const Arguments all = arguments_of(*graph, args, kwargs);
  return are_tensors(all) ? call_tensors(*graph, call, all) : call_arrays(*graph, call, all);
}

}  // namespace fastmlp::frozen

// What a module of Python is, read from it at each call, since hooks, parametrizations and swapped parameters come
// unannounced: whether it may be part of a run of layers that execute as one operation, and with which tensors. Called
// by sequential.cpp and train_step.cpp with the GIL; runs nothing. fastmlp/runs.py holds the same rule for Dynamo.
#pragma once

#include <c10/util/SmallVector.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <optional>

#include "../tensors/stack.h"

namespace fastmlp {

// What fastmlp/runs.py knows and this file is told once: the exact classes of torch.nn and of ours that may be part
// of a run.
//   linear, fused_linear: classes of layers; dropout: one that does nothing outside of training, and else drops
//     elements of what the layer before it computes
//   norm: one that normalises columns by a batch, which only training steps take
//   sequential: the class whose forward is run_children
//   activations: {class: (name, (attribute of each parameter, ...))}
//   kinds: {name: kind}
//   forwards: {class: how it computes}; a class that is not in it, or computes otherwise by now, is called
//   watchers: dictionaries of hooks on all modules; while one holds anything every child is called
void register_modules(const py::object& linear, const py::object& fused_linear, const py::object& dropout,
                      const py::object& norm, const py::object& sequential, const py::dict& activations,
                      const py::dict& kinds, const py::dict& forwards, const py::tuple& watchers);

// What a batch normalisation has besides parameters. The tensors are borrowed, and null where it has none.
struct RunNorm {
  PyObject *running_mean = nullptr, *running_variance = nullptr;
  PyObject* batches = nullptr;     // how many batches it has seen, which this one is about to join
  bool of_batch = false;           // normalises by the batch, not by the running statistics
  std::optional<double> momentum;  // none: statistics are means over all batches
  double eps = 0;
};

// What a run may hold besides layers and their activations: nothing, as operators with a schema compute it; dropout in
// training behind a layer, where its device computes that; and whatever a training step computes, which is batch
// normalisation, too, and activations and dropout anywhere.
enum class Takes { layers, dropout, step };

// Layers and their activations, one after another. Borrows the tensors: no Python code may run that could free them.
class Run {
 public:
  explicit Run(Takes takes) : takes_(takes) {}

  // Takes in a module, or a pair of tensors (weight, and bias or None) that are a layer without a module; false, and
  // nothing changed, if it cannot be next.
  bool extend(PyObject* module);
  // The same for a fastmlp.Linear that stands by itself, whose class is known.
  bool add_fused_layer(PyObject* attributes);

  bool empty() const { return layers_.empty(); }
  // Whether a layer drops.
  bool drops() const;
  // One for each batch normalisation.
  c10::ArrayRef<RunNorm> norms() const { return norms_; }
  c10::ArrayRef<PyObject*> parameters() const { return parameters_; }
  c10::ArrayRef<LayerSpec> layers() const { return layers_; }
  c10::intrusive_ptr<Stack> stack() const;

 private:
  bool add_layer(PyObject* attributes, const ActivationSpec& activation);
  bool add_tensors(PyObject* weight, PyObject* bias, const ActivationSpec& activation);
  bool add_activation(const ActivationSpec& activation);
  bool add_dropout(PyObject* attributes);
  // Whether a dropout in training may follow the last layer of a run that is no training step's.
  bool last_layer_may_drop(bool in_place) const;
  bool add_norm(PyObject* attributes);
  // A layer that leaves its input as it is, for what follows no layer.
  void add_empty_layer();
  void set_activation(const ActivationSpec& activation);

  Takes takes_;
  c10::SmallVector<PyObject*, 16> parameters_;
  c10::SmallVector<LayerSpec, 8> layers_;
  c10::SmallVector<RunNorm, 2> norms_;
  bool activated_ = false;  // the last layer has its activation, or dropout, which comes after that
};

// Of a module's attributes the dictionary of its children, borrowed; null if it has none.
PyObject* children_of(PyObject* attributes);

// Whether an object that Run::extend takes is a layer, with a weight and perhaps a bias.
bool is_layer(PyObject* module);

// The dictionaries of a module's hooks, borrowed, null for those that it lacks; and whether one holds anything.
using Hooks = std::array<PyObject*, 4>;
Hooks hooks_of(PyObject* attributes);
bool any_filled(const Hooks& hooks);
// Whether something, such as a hook, wants the module itself to be called.
bool must_be_called(PyObject* attributes);
// Whether something wants every module to be called.
bool is_watched();

// Whose forward the class of a module has.
enum class Forward { sequential, layer, other };
Forward forward_of(PyObject* module);

}  // namespace fastmlp

// One step of training in one call: forward, loss, backward and the optimizer's step, on the tensors of PyTorch's own
// objects. Made by fastmlp/training.py, which has checked what it is given; whatever can change later is read again at
// each call (train_step_read.cpp), before anything is written (train_step.cpp). Called with the GIL. Computes nothing
// itself: the operations of the parameters' device do (tensors/devices.h).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <vector>

#include "../tensors/borrowed.h"
#include "../contract/loss.h"
#include "../tensors/reshaping.h"
#include "modules.h"
#include "../tensors/devices.h"
#include "optimizer.h"

namespace fastmlp {

struct TrainOptions {
  std::optional<double> max_norm, clip_value;
  int64_t accumulate = 1;
  bool keep_grads = true;
};

// What a network does before its first layer and after its last activation.
struct NetworkEnds {
  bool flattens;       // its input, to rows
  bool matrices_only;  // takes an input of two dimensions alone
  std::string head;    // of the last layer's rows: none, softmax or log_softmax
  Reshapings reshapings;
};

// What the classes of loss and optimizer had when fastmlp was imported. Who replaces one of them wants it to be called.
struct Originals {
  py::object call;     // that of torch.nn.Module
  py::object forward;  // of the loss
  // Of the optimizer. None for a step that was replaced before, which is always called.
  py::object step, zero_grad;
};

class TrainStep {
 public:
  // links: the layers and activations through which the input passes; others: {module: (forward and __call__ of its
  // class, and names and values of attributes)} of the modules at the ends, which `ends` describes; holders: {module:
  // (forward and __call__ of its class, and its children)} of the modules around them. loss: the module, and its kind,
  // an index into Losses; optimizer: with its rule, an index into Rules.
  TrainStep(py::tuple links, py::dict others, NetworkEnds ends, py::dict holders, py::object loss, int kind,
            py::object optimizer, int rule, Originals originals, const TrainOptions& options);

  // The loss. None, and nothing done, if the model, the loss or the optimizer is no longer what it was or does not run
  // as one operation now: fastmlp/training.py says why. Raises for arguments that do not belong together, before
  // anything is written.
  py::object run(const py::object& input, const py::object& target);

  // Steps with one batch after the other, without code of Python in between: the rows that `order` names, `rows` to a
  // batch and what is left to the last one. The losses of the steps that were done: fewer than there are batches if one
  // could not run, as above. An error of a step ends it. For tensors of which has_plain_rows() is true.
  at::Tensor run_all(const at::Tensor& inputs, const at::Tensor& targets, const at::Tensor& order, int64_t rows);

  // For Python's garbage collector.
  int traverse(visitproc visit, void* arg) const;
  void clear();

  // Calls so far whose gradients wait for a step.
  int64_t waiting = 0;

 private:
  // A parameter of the network during one call.
  struct Slot {
    PyObject* object = nullptr;
    bool needed = false;   // requires a gradient
    bool stepped = false;  // belongs to the optimizer
    bool added = false;    // its gradient joins the one that it has
    at::Tensor grad;       // where backward writes; after that, what the loop has in .grad before the step
  };

  // What one call is given, reads and decides.
  struct Call {
    PyObject *input_object, *target_object;  // that the caller holds
    Run run{Takes::step};
    c10::SmallVector<NormTensors, 2> norms;  // one for each of the run
    int64_t in_features = 0, out_features = 0;
    c10::MaybeOwned<at::Tensor> input;  // as the first layer takes it
    c10::intrusive_ptr<Stack> stack;
    LossSpec spec;
    at::Tensor weight;                      // of the loss
    c10::MaybeOwned<at::Tensor> target;     // as the loss takes it, gapless
    bool steps = false;                     // the optimizer steps
    bool keep = true;                       // gradients are left in .grad for that step
    std::optional<OptimizerStep> own_step;  // none: torch's own step is called
    // What slots and others point to. Another thread may take a parameter out of its module as soon as code of Python
    // runs, which already a lookup by a tensor is.
    c10::SmallVector<py::object, 16> objects;
    Held tensors;

    Call(PyObject* input, PyObject* target) : input_object(input), target_object(target) {}
    void hold(PyObject* object) { objects.push_back(py::reinterpret_borrow<py::object>(object)); }
  };

  // One step; nothing if it cannot run.
  std::optional<at::Tensor> step(PyObject* input, PyObject* target);

  bool read_all(Call& call);
  // False if explain() has to say why.
  bool read(Call& call);
  bool read_model(Run& run) const;
  bool read_parameters(Call& call);
  bool read_norms(Call& call) const;
  bool read_features(Call& call) const;
  bool read_loss(Call& call) const;
  bool ends_as_expected(const Run& run) const;
  bool read_optimizer() const;

  // Raise for what is not as expected.
  void check_modes(c10::DeviceType device) const;
  // Finds the input as the first layer takes it.
  void check_input(Call& call) const;
  void check_rows(const Call& call) const;
  void check_target(Call& call) const;

  Slot* slot_of(PyObject* parameter, size_t& next);
  void take_owners();
  void place_grads(bool keep);
  void read_step(std::optional<OptimizerStep>& step);
  void plan(Call& call);
  void count_batches(const Call& call) const;
  at::Tensor pass(Call& call);
  void hold_all(Call& call) const;
  void finish_grads(bool keep);
  void drop_grads();
  void clip() const;
  void take_step(std::optional<OptimizerStep>& step);

  py::tuple links_;
  py::dict at_ends_;
  const NetworkEnds ends_;
  py::dict holders_;
  py::object loss_;
  int kind_;
  py::object optimizer_;
  int rule_;
  Originals originals_;
  TrainOptions options_;

  bool running_ = false;
  std::vector<Slot> slots_;
  Borrowed parameters_;
  std::vector<PyObject*> others_;  // of the optimizer, not of the model
  // Between calls they hold nothing that is needed, only memory.
  Tensors scratch_;
  at::Tensor memory_;
};

// Whether hooks want to see the gradient of a tensor that has none yet: its own, or those of the node of the graph that
// would accumulate it.
bool has_hooks(const at::Tensor& parameter);

}  // namespace fastmlp

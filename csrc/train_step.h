// One step of training in one call: forward, loss, backward and the optimizer's step, on the tensors of PyTorch's own
// objects. Made by fastmlp/training.py, which has checked what it is given; whatever can change later is read again at
// each call. Called with the GIL. Computes nothing itself: the operators of a device do.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <vector>

#include "borrowed.h"
#include "loss.h"
#include "modules.h"
#include "operators.h"
#include "update.h"

namespace fastmlp {

struct TrainOptions {
  std::optional<double> max_norm, clip_value;
  int64_t accumulate = 1;
  bool keep_grads = true;
};

class TrainStep {
 public:
  // links: the modules through which the input passes; holders: {module: its children} of the modules around them.
  // loss: the module, and its kind. step: the function that the optimizer's class has for one.
  TrainStep(py::tuple links, py::dict holders, py::object loss, int kind, py::object optimizer, int rule,
            py::object step, const TrainOptions& options);

  // The loss. None, and nothing done, if the model or the loss is no longer what it was or does not run as one
  // operation now. Raises for arguments that do not belong together, before anything is written.
  py::object run(const py::object& input, const py::object& target);

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
    at::Tensor grad;       // where backward writes
  };

  bool read_model(Run& run) const;
  bool read_loss(LossSpec& spec, at::Tensor& weight) const;
  c10::MaybeOwned<at::Tensor> check_target(const LossSpec& spec, const Stack& stack, const at::Tensor& input,
                                           const py::object& target, at::Tensor& weight) const;
  void take_slots(const Run& run);
  void place_grads(bool keep);
  void finish_grads(bool keep);
  void clip() const;
  bool steps_itself() const;
  void tell_scheduler() const;

  py::tuple links_;
  py::dict holders_;
  py::object loss_;
  int kind_;
  py::object optimizer_;
  Rule rule_;
  py::object step_;
  TrainOptions options_;

  bool running_ = false;
  std::vector<Slot> slots_;
  Borrowed parameters_;
  // Between calls they hold nothing that is needed, only memory.
  Tensors scratch_;
  at::Tensor memory_;
};

}  // namespace fastmlp

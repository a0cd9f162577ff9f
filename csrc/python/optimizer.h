// The step that an optimizer of torch.optim whose rule is in contract/update.h, or a subclass of ours, would take now.
// Groups and states are read at each call, because schedulers and load_state_dict replace what is in them. Used by
// fastmlp/optim.py through bindings.cpp, by train_step.cpp and by capture_replay.cpp, with the GIL. Computes nothing:
// cpu/step.cpp does.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>
#include <vector>

#include "../tensors/borrowed.h"
#include "../contract/update.h"
#include "../tensors/devices.h"

namespace fastmlp {

class OptimizerStep {
 public:
  // The gradient of a parameter; undefined if it has none and is not to move. Its numbers are read by apply() only, so
  // that they may be written until then.
  using GradOf = c10::function_ref<at::Tensor(PyObject*)>;

  // Reads, and writes nothing. Raises KeyError for a group without an entry that torch would miss too.
  // `rule` is an index into Rules.
  OptimizerStep(const py::handle& optimizer, int rule, GradOf grad_of);

  // Parameters with a gradient that are for torch to move: sparse, complex, on a device that lacks updates or on
  // another one than the others, and so on.
  const std::vector<PyObject*>& left() const { return left_; }

  // Whether a parameter stands twice in the groups. Torch's step moves it once after the other, each time by the state
  // that the time before has left, which updates side by side cannot.
  bool repeats() const { return repeats_; }

  // What must live while the GIL is given up between reading and applying.
  void hold(Held& held) const;

  // Creates missing state as torch's first step would, moves the parameters and counts the step.
  void apply();

 private:
  struct Group;
  struct Missing {
    PyObject* parameter;
    PyObject* name;
    at::Tensor tensor;
  };

  bool add(Group& group, PyObject* parameter, at::Tensor grad, PyObject* state);
  bool add_states(Group& group, PyObject* parameter, PyObject* state, const at::Tensor& like, Update& update);
  const at::Tensor* counter_of(const Group& group, PyObject* parameter, PyObject* state);
  const at::Tensor* state_tensor(PyObject* parameter, PyObject* state, PyObject* name, const at::Tensor& like,
                                 bool zero);

  py::object state_;
  std::vector<Update> updates_;
  c10::Device device_ = host;      // of all updates
  Borrowed written_, counters_;    // whose versions count
  std::vector<at::Tensor> grads_;  // one an update
  // Updates whose gradient lies otherwise than its parameter, which is named too: apply() copies it.
  std::vector<std::pair<size_t, PyObject*>> strays_;
  std::vector<Missing> missing_;
  std::vector<PyObject*> left_;
  bool repeats_ = false;
};

// Calls visit(parameter) for each parameter of an optimizer, group by group.
void for_each_parameter(const py::handle& optimizer, c10::function_ref<void(PyObject*)> visit);

// optimizer.step() of fastmlp.optim without a closure; None, and nothing done, if all of it is for torch: something
// watches the step, or the device of the first parameter has no updates, so that nothing is read in vain where torch
// moves all parameters. Else the parameters that are left for torch; if there are any, the others move only if
// `partly`, so that torch, which may refuse them, can go first.
py::object step_optimizer(const py::handle& optimizer, int rule, bool partly);

// optimizer.zero_grad(): every gradient becomes None.
void drop_grads(const py::handle& optimizer);

// Whether something has to see a step of the optimizer: a hook of its own or of all optimizers, a profiler, a scaler of
// gradients, or a mode of torch.
bool is_step_watched(const py::handle& optimizer);

// Whether a call of optimizer.step() would be nothing but the arithmetic of `step`, the function of its class.
bool steps_itself(const py::handle& optimizer, PyObject* step);

// Tells the schedulers of an optimizer that it has stepped.
void tell_scheduler(const py::handle& optimizer);

// Dictionaries of hooks on all optimizers. Held for the life of the process.
void register_optimizer_hooks(const py::tuple& hooks);

}  // namespace fastmlp

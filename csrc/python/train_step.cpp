// The order of events of train_step.h: everything is read and checked (train_step_read.cpp) before anything is written;
// then come one pass, the gradients as the loop leaves them, and the update. Called by fastmlp/training.py through
// bindings.cpp, with the GIL. Must not name a loss or an optimizer: what they read is in contract/.
#include "train_step.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_foreach_clamp_max.h>
#include <ATen/ops/_foreach_clamp_min.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/clamp_max.h>
#include <ATen/ops/item.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../contract/training_info.h"
#include "clip.h"
#include "gil.h"
#include "objects.h"
#include "route.h"
#include "rows.h"

namespace fastmlp {
namespace {

// Whether nobody but the parameter sees a gradient's memory, so that it may be written again where the loop would take
// new memory.
bool is_private(const at::Tensor& grad, const at::Tensor& parameter) {
  return grad.defined() && grad.use_count() == 1 && is_plain(grad) && grad.storage().use_count() == 1 &&
         grad.device() == parameter.device() && grad.scalar_type() == parameter.scalar_type() &&
         grad.sizes() == parameter.sizes() && grad.is_contiguous() && !grad.requires_grad() && !grad.is_inference();
}

const at::Tensor& kept(at::Tensor& place, at::IntArrayRef sizes, const at::Tensor& like) {
  if (!place.defined() || place.sizes() != sizes || place.scalar_type() != like.scalar_type() ||
      place.device() != like.device()) {
    place = operations_for(like).empty(sizes, like);
  }
  return place;
}

struct Running {
  bool& flag;
  explicit Running(bool& flag) : flag(flag) {
    TORCH_CHECK(!flag, "fastmlp: this TrainStep is running already");
    flag = true;
  }
  ~Running() { flag = false; }
};

}  // namespace

TrainStep::TrainStep(py::tuple links, py::dict others, NetworkEnds ends, py::dict holders, py::object loss, int kind,
                     py::object optimizer, int rule, Originals originals, const TrainOptions& options)
    : links_(std::move(links)),
      at_ends_(std::move(others)),
      ends_(std::move(ends)),
      holders_(std::move(holders)),
      loss_(std::move(loss)),
      kind_(kind),
      optimizer_(std::move(optimizer)),
      rule_(rule),
      originals_(std::move(originals)),
      options_(options) {}

int TrainStep::traverse(visitproc visit, void* arg) const {
  for (PyObject* object :
       {links_.ptr(), at_ends_.ptr(), holders_.ptr(), loss_.ptr(), optimizer_.ptr(), originals_.call.ptr(),
        originals_.forward.ptr(), originals_.step.ptr(), originals_.zero_grad.ptr()})
    Py_VISIT(object);
  return 0;
}

void TrainStep::clear() {
  links_ = py::tuple();
  at_ends_ = holders_ = py::dict();
  loss_ = optimizer_ = py::none();
  originals_ = {py::none(), py::none(), py::none(), py::none()};
}

// Searches from `next` on: parameters are asked for in the order of the model, as nearly always.
TrainStep::Slot* TrainStep::slot_of(PyObject* parameter, size_t& next) {
  for (size_t i = 0; i < slots_.size(); i++, next++) {
    if (next >= slots_.size()) next = 0;
    if (slots_[next].object == parameter) return &slots_[next++];
  }
  return nullptr;
}

// Which parameters the optimizer has.
void TrainStep::take_owners() {
  others_.clear();
  size_t next = 0;
  for_each_parameter(optimizer_, [&](PyObject* parameter) {
    Slot* const slot = slot_of(parameter, next);
    slot ? void(slot->stepped = true) : others_.push_back(parameter);
  });
}

// Where each gradient is written: memory of its own, unless the loop would add it to what is there.
void TrainStep::place_grads(bool keep) {
  scratch_.resize(slots_.size());
  for (size_t i = 0; i < slots_.size(); i++) {
    Slot& slot = slots_[i];
    if (!slot.needed) continue;
    const at::Tensor& parameter = parameters_[i];
    const at::Tensor& grad = parameter.grad();
    slot.added = grad.defined() && !(slot.stepped && waiting == 0);
    TORCH_CHECK(!slot.added || (is_plain(grad) && grad.device() == parameter.device() && !grad.is_inference()),
                "fastmlp: the .grad that a gradient would be added to is no plain tensor of ",
                devices_in_words(&trains),
                ", or was made under torch.inference_mode: set it to None, or to a plain copy");
    if (slot.added || (slot.stepped && !keep)) {
      slot.grad = kept(scratch_[i], parameter.sizes(), parameter);
    } else {
      slot.grad = is_private(grad, parameter) ? grad : operations_for(parameter).empty(parameter.sizes(), parameter);
    }
  }
}

// Reads the optimizer's step as an operation of ours; none if torch's own step has to be called.
void TrainStep::read_step(std::optional<OptimizerStep>& step) {
  if (!steps_itself(optimizer_, originals_.step.ptr())) return;
  size_t next = 0;
  step.emplace(optimizer_, rule_, [&](PyObject* parameter) {
    const Slot* const slot = slot_of(parameter, next);
    if (slot && slot->needed && !slot->added) return slot->grad;
    // The rest moves by what is in .grad. That is None if this call begins with zero_grad(), and stays None unless the
    // gradient is computed here.
    const bool cleared = waiting == 0 && !(slot && slot->needed);
    return cleared ? at::Tensor() : THPVariable_Unpack(parameter).grad();
  });
  if (!step->left().empty() || step->repeats()) step.reset();
}

// What the loop leaves in .grad before the step.
void TrainStep::finish_grads(bool keep) {
  const at::NoGradGuard guard;
  if (waiting == 0) {
    for (PyObject* parameter : others_) THPVariable_Unpack(parameter).mutable_grad().reset();
  }
  for (Slot& slot : slots_) {
    at::Tensor& grad = THPVariable_Unpack(slot.object).mutable_grad();
    if (!slot.needed || (slot.stepped && !keep)) {
      if (slot.stepped && waiting == 0) grad.reset();
      if (!slot.needed) slot.grad = grad;
    } else if (slot.added) {
      grad.add_(slot.grad);
      slot.grad = grad;
    } else if (!grad.is_same(slot.grad)) {
      grad = slot.grad;
    }
  }
}

// As zero_grad() leaves them, after a pass that has written into their memory and has no loss.
void TrainStep::drop_grads() {
  for (const Slot& slot : slots_) {
    if (slot.stepped ? waiting == 0 : slot.needed && !slot.added)
      THPVariable_Unpack(slot.object).mutable_grad().reset();
  }
  if (waiting > 0) return;
  for (PyObject* parameter : others_) THPVariable_Unpack(parameter).mutable_grad().reset();
}

// As torch.nn.utils.clip_grad_norm_ and clip_grad_value_.
void TrainStep::clip() const {
  if (!options_.max_norm && !options_.clip_value) return;
  const at::NoGradGuard guard;
  Tensors grads;
  for (const Slot& slot : slots_) {
    if (slot.grad.defined()) grads.push_back(slot.grad);
  }
  if (options_.clip_value) {
    if (clip_to_value(grads, *options_.clip_value)) return;
    at::_foreach_clamp_min_(grads, -*options_.clip_value);
    at::_foreach_clamp_max_(grads, *options_.clip_value);
  } else if (!clip_to_norm(grads, *options_.max_norm, NormOrder::two, false)) {
    const at::Tensor norm = at::linalg_vector_norm(at::stack(at::_foreach_norm(grads)), 2);
    at::_foreach_mul_(grads, at::clamp_max(*options_.max_norm / (norm + 1e-6), 1.0));
  }
}

// Everything that a call needs to know before it writes; false if explain() has to say why it cannot run.
bool TrainStep::read_all(Call& call) {
  check_plain("input", call.input_object);
  check_modes(THPVariable_Unpack(call.input_object).device().type());
  if (!read(call)) return false;
  check_input(call);
  check_target(call);
  take_owners();
  for (PyObject* parameter : others_) call.hold(parameter);
  return true;
}

// Where gradients are written, and who takes the optimizer's step.
void TrainStep::plan(Call& call) {
  call.steps = waiting + 1 >= options_.accumulate;
  call.keep = options_.keep_grads;
  place_grads(call.keep);
  if (!call.steps) return;
  read_step(call.own_step);
  if (call.own_step || call.keep) return;
  // Torch's own step finds gradients where it looks for them.
  call.keep = true;
  place_grads(call.keep);
}

// Forward, loss and backward; the loss.
at::Tensor TrainStep::pass(Call& call) {
  const at::Tensor& input = *call.input;
  const bool release = multiply_adds(parameters_, input) > worth_releasing;
  // Hooks of the optimizer's step are code of Python, too.
  if (release || (call.steps && !call.own_step)) hold_all(call);
  const ReleasedGil released(release);
  const at::AutoDispatchBelowADInplaceOrView guard;
  Borrowed grads;
  for (const Slot& slot : slots_) grads.push_back(slot.grad);
  return operations_for(input).train_into(*call.stack, input, parameters_, call.spec, *call.target, call.weight,
                                          call.norms, grads, memory_);
}

// As the forward of BatchNorm1d does. Frozen networks see by it that the statistics moved.
void TrainStep::count_batches(const Call& call) const {
  for (const RunNorm& norm : call.run.norms()) {
    if (!norm.batches) continue;
    const at::Tensor& batches = THPVariable_Unpack(norm.batches);
    ++*batches.mutable_data_ptr<int64_t>();
    batches.unsafeGetTensorImpl()->bump_version();
  }
}

// What must live while code of Python may run.
void TrainStep::hold_all(Call& call) const {
  call.tensors.take({*call.input, *call.target, call.weight});
  call.tensors.take(parameters_);
  for (const Slot& slot : slots_) call.tensors.take(slot.grad);
  for (PyObject* parameter : others_) call.tensors.take(THPVariable_Unpack(parameter));
  for (const NormTensors& norm : call.norms) call.tensors.take({norm.running_mean, norm.running_variance});
  if (call.own_step) call.own_step->hold(call.tensors);
}

// The optimizer's step, from the gradients that finish_grads() left.
void TrainStep::take_step(std::optional<OptimizerStep>& step) {
  clip();
  if (step) {
    tell_scheduler(optimizer_);
    step->apply();
  } else {
    optimizer_.attr("step")();
    // Torch's fused optimizers do not count the versions of what they write.
    for (const Slot& slot : slots_) {
      if (slot.stepped) THPVariable_Unpack(slot.object).unsafeGetTensorImpl()->bump_version();
    }
  }
  if (options_.keep_grads) return;
  // Also of parameters that the optimizer does not have.
  for (const Slot& slot : slots_) THPVariable_Unpack(slot.object).mutable_grad().reset();
}

std::optional<at::Tensor> TrainStep::step(PyObject* input, PyObject* target) {
  const Running running(running_);
  Call call(input, target);
  if (!read_all(call)) return std::nullopt;
  plan(call);
  at::Tensor loss = pass(call);
  count_batches(call);
  if (!loss.defined()) {
    drop_grads();
    TORCH_CHECK(false, "fastmlp: the model's output holds NaN, expected numbers between 0 and 1, which ",
                loss_info(kind_).name, " takes");
  }
  finish_grads(call.keep);
  // If the optimizer's step raises, the gradients of a window still wait for it.
  waiting = options_.accumulate > 1 ? waiting + 1 : 0;
  if (call.steps) {
    take_step(call.own_step);
    waiting = 0;
  }
  for (Slot& slot : slots_) slot.grad.reset();
  parameters_.clear();
  return loss;
}

py::object TrainStep::run(const py::object& input, const py::object& target) {
  const std::optional<at::Tensor> loss = step(input.ptr(), target.ptr());
  return loss ? py::cast(*loss) : py::none();
}

at::Tensor TrainStep::run_all(const at::Tensor& inputs, const at::Tensor& targets, const at::Tensor& order,
                              int64_t rows) {
  Rows input(inputs, rows), target(targets, rows);
  const int64_t* const indices = order.const_data_ptr<int64_t>();
  const int64_t all = order.numel();
  std::vector<double> losses;
  losses.reserve(all / rows + 1);
  at::TensorOptions options;
  for (int64_t i = 0; i < all; i += rows) {
    if (PyErr_CheckSignals() < 0) throw py::error_already_set();
    const int64_t count = std::min(rows, all - i);
    const std::optional<at::Tensor> loss = step(input.take(indices + i, count), target.take(indices + i, count));
    if (!loss) break;
    // All have the same dtype, or a step has raised.
    options = loss->options();
    losses.push_back(loss->item<double>());
  }
  return at::tensor(losses, options);
}

}  // namespace fastmlp

// The order of events of train_step.h: everything is read and checked before anything is written.
#include "train_step.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <functional>
#include <utility>

#include "checks.h"
#include "optimizer.h"
#include "route.h"

namespace fastmlp {
namespace {

struct Names {
  static PyObject* intern(const char* name) { return PyUnicode_InternFromString(name); }
  PyObject* reduction = intern("reduction");
  PyObject* delta = intern("delta");
  PyObject* ignore_index = intern("ignore_index");
  PyObject* label_smoothing = intern("label_smoothing");
  PyObject* buffers = intern("_buffers");
  PyObject* weight = intern("weight");
  PyObject* pos_weight = intern("pos_weight");
  PyObject* step = intern("step");
  PyObject* wrapped = intern("_wrapped_by_lr_sched");
  PyObject* called = intern("_opt_called");
};
const Names& names() {
  static const Names all;
  return all;
}

// Whether modules hold just these children still.
bool holds(PyObject* module, PyObject* expected) {
  const py::object attributes = attributes_of(module);
  PyObject* children = children_of(attributes.ptr());
  if (must_be_called(attributes.ptr()) || !children || PyDict_GET_SIZE(children) != PyTuple_GET_SIZE(expected))
    return false;
  PyObject *key = nullptr, *child = nullptr;
  Py_ssize_t at = 0;
  for (Py_ssize_t i = 0; PyDict_Next(children, &at, &key, &child); i++) {
    if (child != PyTuple_GET_ITEM(expected, i)) return false;
  }
  return true;
}

template <class T> bool read_number(PyObject* attributes, PyObject* name, T& value) {
  PyObject* object = item(attributes, name);
  if (!object || !(PyFloat_Check(object) || PyLong_Check(object))) return false;
  value = py::handle(object).cast<T>();
  return true;
}

bool has_hooks(PyObject* parameter) {
  const auto* meta = torch::autograd::impl::get_autograd_meta(THPVariable_Unpack(parameter));
  if (!meta || (meta->hooks_.empty() && !meta->post_acc_grad_hooks_)) return false;
  // Dictionaries of hooks, which may be empty.
  const auto filled = [&](const char* name) {
    const py::object hooks = py::handle(parameter).attr(name);
    return !hooks.is_none() && py::len(hooks) > 0;
  };
  return filled("_backward_hooks") || filled("_post_accumulate_grad_hooks");
}

// Whether nobody but the parameter sees a gradient's memory, so that it may be written again where the loop would take
// new memory.
bool is_private(const at::Tensor& grad, const at::Tensor& parameter) {
  return grad.defined() && grad.use_count() == 1 && is_plain(grad) && grad.storage().use_count() == 1 &&
         grad.scalar_type() == parameter.scalar_type() && grad.sizes() == parameter.sizes() && grad.is_contiguous() &&
         !grad.requires_grad();
}

const at::Tensor& kept(at::Tensor& place, at::IntArrayRef sizes, const at::Tensor& like) {
  if (!place.defined() || place.sizes() != sizes || place.scalar_type() != like.scalar_type()) {
    place = cpu::uninitialised(sizes, like);
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

TrainStep::TrainStep(py::tuple links, py::dict holders, py::object loss, int kind, py::object optimizer, int rule,
                     py::object step, const TrainOptions& options)
    : links_(std::move(links)),
      holders_(std::move(holders)),
      loss_(std::move(loss)),
      kind_(kind),
      optimizer_(std::move(optimizer)),
      rule_(Rule(rule)),
      step_(std::move(step)),
      options_(options) {}

int TrainStep::traverse(visitproc visit, void* arg) const {
  for (PyObject* object : {links_.ptr(), holders_.ptr(), loss_.ptr(), optimizer_.ptr(), step_.ptr()}) Py_VISIT(object);
  return 0;
}

void TrainStep::clear() {
  links_ = py::tuple();
  holders_ = py::dict();
  loss_ = optimizer_ = step_ = py::none();
}

bool TrainStep::read_model(Run& run) const {
  if (is_watched()) return false;
  PyObject *module = nullptr, *children = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(holders_.ptr(), &at, &module, &children);) {
    if (!holds(module, children)) return false;
  }
  for (const py::handle link : links_) {
    if (!run.extend(link.ptr())) return false;
  }
  return !run.empty();
}

bool TrainStep::read_loss(LossSpec& spec, at::Tensor& weight) const {
  const py::object attributes = attributes_of(loss_.ptr());
  PyObject* reduction = item(attributes.ptr(), names().reduction);
  if (must_be_called(attributes.ptr()) || !reduction || !PyUnicode_Check(reduction)) return false;
  spec.kind = kind_;
  spec.divisor = double(options_.accumulate);
  spec.mean = PyUnicode_CompareWithASCIIString(reduction, "mean") == 0;
  if (!spec.mean && PyUnicode_CompareWithASCIIString(reduction, "sum") != 0) return false;
  PyObject* buffers = item(attributes.ptr(), names().buffers);
  const auto buffer = [&](PyObject* name) {
    PyObject* found = buffers ? item(buffers, name) : nullptr;
    return found == Py_None ? nullptr : found;
  };
  PyObject* given = nullptr;
  if (kind_ == loss_kind<Huber>) {
    return read_number(attributes.ptr(), names().delta, spec.delta);
  }
  if (kind_ == loss_kind<BinaryCrossEntropy>) {
    if (buffer(names().weight)) return false;
    given = buffer(names().pos_weight);
  } else if (kind_ == cross_entropy_kind) {
    if (!read_number(attributes.ptr(), names().ignore_index, spec.ignore_index) ||
        !read_number(attributes.ptr(), names().label_smoothing, spec.label_smoothing))
      return false;
    given = buffer(names().weight);
  }
  if (given && (!THPVariable_Check(given) || !is_plain(given))) return false;
  if (given) weight = THPVariable_Unpack(given);
  return true;
}

// As the loss takes it, gapless.
c10::MaybeOwned<at::Tensor> TrainStep::check_target(const LossSpec& spec, const Stack& stack, const at::Tensor& input,
                                                    const py::object& target, at::Tensor& weight) const {
  check_plain("target", target.ptr());
  const at::Tensor& given = THPVariable_Unpack(target.ptr());
  TORCH_CHECK(!given.requires_grad(), "fastmlp: target requires a gradient, which TrainStep does not compute");
  const int64_t columns = parameters_[stack.weight(stack.layers() - 1)].size(0);
  at::DimVector output(input.sizes());
  output.back() = columns;
  if (weight.defined()) {
    const bool fits = weight.dim() == 1 && weight.size(0) == columns;
    const bool one = spec.kind != cross_entropy_kind && weight.numel() == 1;
    const char* const name = spec.kind == cross_entropy_kind ? "weight" : "pos_weight";
    TORCH_CHECK(fits || one, "fastmlp: ", name, " of the loss has shape ", weight.sizes(), ", expected [", columns,
                "], one for each column of the output");
    TORCH_CHECK(weight.scalar_type() == input.scalar_type(), "fastmlp: ", name, " of the loss has dtype ",
                weight.scalar_type(), ", expected the dtype of the output, ", input.scalar_type());
    TORCH_CHECK(!weight.requires_grad(), "fastmlp: ", name,
                " of the loss requires a gradient, which TrainStep does not compute");
    weight = weight.reshape({-1}).expand({columns}).contiguous();
  }
  if (spec.kind != cross_entropy_kind) {
    TORCH_CHECK(given.sizes() == at::IntArrayRef(output), "fastmlp: target has shape ", given.sizes(), ", expected ",
                at::IntArrayRef(output), ", the shape of the output");
    TORCH_CHECK(given.scalar_type() == input.scalar_type(), "fastmlp: target has dtype ", given.scalar_type(),
                ", expected the dtype of the output, ", input.scalar_type());
    return given.expect_contiguous();
  }
  const at::IntArrayRef leading(output.data(), output.size() - 1);
  TORCH_CHECK(output.size() <= 2, "fastmlp: CrossEntropyLoss got an output of shape ", at::IntArrayRef(output),
              ", expected (N, C) or (C)");
  TORCH_CHECK(given.scalar_type() == at::kLong, "fastmlp: target has dtype ", given.scalar_type(),
              ", expected class indices of dtype ", at::kLong);
  TORCH_CHECK(given.sizes() == leading, "fastmlp: target has shape ", given.sizes(), ", expected ", leading,
              ", a class for each row of the output");
  c10::MaybeOwned<at::Tensor> classes = given.expect_contiguous();
  const int64_t* const all = classes->const_data_ptr<int64_t>();
  for (int64_t i = 0; i < classes->numel(); i++) {
    TORCH_CHECK_INDEX(all[i] == spec.ignore_index || (all[i] >= 0 && all[i] < columns), "fastmlp: target holds class ",
                      all[i], ", expected 0 to ", columns - 1, ", or the loss's ignore_index, ", spec.ignore_index);
  }
  return classes;
}

void TrainStep::take_slots(const Run& run) {
  slots_.clear();
  parameters_.clear();
  for (PyObject* object : run.parameters()) {
    const at::Tensor& parameter = THPVariable_Unpack(object);
    Slot& slot = slots_.emplace_back();
    slot.object = object;
    slot.needed = parameter.requires_grad();
    TORCH_CHECK(!slot.needed || (parameter.is_leaf() && !has_hooks(object)),
                "fastmlp: a parameter has hooks, or is computed from another one, which TrainStep would not see");
    parameters_.push_back(parameter);
  }
  TORCH_CHECK(std::any_of(slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.needed; }),
              "fastmlp: no parameter of the model requires a gradient");
  c10::SmallVector<PyObject*, 32> sorted(run.parameters().begin(), run.parameters().end());
  std::sort(sorted.begin(), sorted.end(), std::less<>());
  TORCH_CHECK(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(),
              "fastmlp: a parameter stands twice in the model, whose gradients TrainStep does not add up");
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
    TORCH_CHECK(!slot.added || is_plain(grad),
                "fastmlp: a parameter has a gradient that is no plain tensor of the CPU");
    if (slot.added || (slot.stepped && !keep)) {
      slot.grad = kept(scratch_[i], parameter.sizes(), parameter);
    } else {
      slot.grad = is_private(grad, parameter) ? grad : cpu::uninitialised(parameter.sizes(), parameter);
    }
  }
}

// What the loop leaves in .grad before the step.
void TrainStep::finish_grads(bool keep) {
  const at::NoGradGuard guard;
  for (size_t i = 0; i < slots_.size(); i++) {
    Slot& slot = slots_[i];
    at::Tensor& grad = THPVariable_Unpack(slot.object).mutable_grad();
    if (!slot.needed || (slot.stepped && !keep)) {
      if (slot.stepped && waiting == 0) grad.reset();
    } else if (slot.added) {
      grad.add_(slot.grad);
      slot.grad = grad;
    } else if (!grad.is_same(slot.grad)) {
      grad = slot.grad;
    }
  }
}

// As torch.nn.utils.clip_grad_norm_ and clip_grad_value_.
void TrainStep::clip() const {
  if (!options_.max_norm && !options_.clip_value) return;
  const at::NoGradGuard guard;
  Tensors grads;
  for (const Slot& slot : slots_) {
    if (slot.needed) grads.push_back(slot.grad);
  }
  if (options_.clip_value) {
    at::_foreach_clamp_min_(grads, -*options_.clip_value);
    at::_foreach_clamp_max_(grads, *options_.clip_value);
  } else {
    const at::Tensor norm = at::linalg_vector_norm(at::stack(at::_foreach_norm(grads)), 2);
    at::_foreach_mul_(grads, at::clamp_max(*options_.max_norm / (norm + 1e-6), 1.0));
  }
}

// Whether a step of the optimizer is nothing but its arithmetic. A scheduler replaces the instance's, to know that it
// was called.
bool TrainStep::steps_itself() const {
  if (is_step_watched(optimizer_) || _PyType_Lookup(Py_TYPE(optimizer_.ptr()), names().step) != step_.ptr())
    return false;
  PyObject* const own = item(attributes_of(optimizer_.ptr()).ptr(), names().step);
  return !own || PyObject_HasAttr(own, names().wrapped);
}

// What such a scheduler looks at.
void TrainStep::tell_scheduler() const {
  const py::object attributes = attributes_of(optimizer_.ptr());
  if (item(attributes.ptr(), names().step) && PyObject_SetAttr(optimizer_.ptr(), names().called, Py_True) < 0)
    throw py::error_already_set();
}

py::object TrainStep::run(const py::object& given, const py::object& target) {
  const Running running(running_);
  Run run;
  LossSpec spec;
  at::Tensor weight;
  if (!read_model(run) || !read_loss(spec, weight)) return py::none();
  check_plain("input", given.ptr());
  for (PyObject* parameter : run.parameters()) check_plain("a parameter", parameter);
  const at::Tensor& input = THPVariable_Unpack(given.ptr());
  const auto dtype = input.scalar_type(), expected = THPVariable_Unpack(run.parameters()[0]).scalar_type();
  TORCH_CHECK(expected == at::kFloat || expected == at::kDouble, "fastmlp: parameters have dtype ", expected,
              ", expected float32 or float64");
  TORCH_CHECK(dtype == expected, "fastmlp: input has dtype ", dtype, ", expected that of the parameters, ", expected);
  const char* const why = obstacle(given.ptr(), run.parameters());
  TORCH_CHECK(!why, "fastmlp: TrainStep cannot run: ", why);
  TORCH_CHECK(!at::autocast::is_autocast_enabled(at::kCPU),
              "fastmlp: TrainStep cannot run under autocast, which would change the dtype of the layers");
  TORCH_CHECK(!input.requires_grad(), "fastmlp: input requires a gradient, which TrainStep does not compute");
  take_slots(run);
  const c10::intrusive_ptr<Stack> stack = run.stack();
  check_forward(*stack, input, parameters_);

  const c10::MaybeOwned<at::Tensor> checked = check_target(spec, *stack, input, target, weight);

  std::vector<PyObject*> others;
  size_t next = 0;
  const auto slot_of = [&](PyObject* parameter) -> Slot* {
    // In the order of the model, as nearly always.
    for (size_t i = 0; i < slots_.size(); i++, next++) {
      if (next >= slots_.size()) next = 0;
      if (slots_[next].object == parameter) return &slots_[next++];
    }
    return nullptr;
  };
  for_each_parameter(optimizer_, [&](PyObject* parameter) {
    Slot* const slot = slot_of(parameter);
    slot ? void(slot->stepped = true) : others.push_back(parameter);
  });
  const bool last = waiting + 1 == options_.accumulate;
  std::optional<OptimizerStep> step;
  place_grads(options_.keep_grads);
  if (last && steps_itself()) {
    step.emplace(optimizer_, rule_, [&](PyObject* parameter) {
      const Slot* const slot = slot_of(parameter);
      if (!slot || !slot->needed) return at::Tensor();
      return slot->added ? THPVariable_Unpack(parameter).grad() : slot->grad;
    });
    if (!step->left().empty()) step.reset();
  }
  // Torch's own step finds gradients where it looks for them.
  const bool keep = options_.keep_grads || (last && !step);
  if (keep != options_.keep_grads) place_grads(keep);

  Held held;
  const auto hold = [&] {
    held.take({input, *checked, weight});
    held.take(parameters_);
    for (const Slot& slot : slots_) held.take(slot.grad);
    for (PyObject* parameter : others) held.take(THPVariable_Unpack(parameter));
    if (step) step->hold(held);
  };
  // Hooks of the optimizer's step are code of Python, too.
  if (last && !step) hold();
  double loss = 0;
  {
    constexpr double worth_releasing = 1 << 16;  // multiply-adds: some microseconds
    double work = 0;
    for (const at::Tensor& parameter : at::TensorList(parameters_)) work += double(parameter.numel());
    std::optional<py::gil_scoped_release> release;
    if (work * double(input.numel()) > worth_releasing) {
      hold();
      release.emplace();
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    Borrowed grads;
    for (const Slot& slot : slots_) grads.push_back(slot.grad);
    loss = cpu::train_into(*stack, input, parameters_, spec, *checked, weight, grads, memory_);
  }
  if (waiting == 0) {
    for (PyObject* parameter : others) THPVariable_Unpack(parameter).mutable_grad().reset();
  }
  finish_grads(keep);
  waiting = last ? 0 : waiting + 1;
  if (last) {
    clip();
    if (step) {
      tell_scheduler();
      step->apply();
    } else {
      optimizer_.attr("step")();
      // Which torch's fused kernels do not count.
      for (const Slot& slot : slots_) {
        if (slot.stepped) THPVariable_Unpack(slot.object).unsafeGetTensorImpl()->bump_version();
      }
    }
    if (keep != options_.keep_grads) {
      for (Slot& slot : slots_) {
        if (slot.stepped) THPVariable_Unpack(slot.object).mutable_grad().reset();
      }
    }
  }
  for (Slot& slot : slots_) slot.grad.reset();
  parameters_.clear();

  at::Tensor result = cpu::uninitialised({}, input);
  if (dtype == at::kFloat) {
    *result.mutable_data_ptr<float>() = float(loss);
  } else {
    *result.mutable_data_ptr<double>() = loss;
  }
  return py::cast(result);
}

}  // namespace fastmlp

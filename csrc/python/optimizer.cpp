// Reads an optimizer's groups and states by lookups in the dictionaries that torch.optim keeps: which entries there are
// is in the descriptions of contract/update.h, which this file enumerates. Called as optimizer.h says. Must not name a
// rule.
#include "optimizer.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/profiler/api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <optional>

#include "../contract/training_info.h"
#include "../tensors/devices.h"
#include "../tensors/dtypes.h"
#include "gil.h"
#include "objects.h"
#include "route.h"

namespace fastmlp {
namespace {

std::vector<PyObject*> hooks_of_all;

// The description of a rule, with names as Python has them: null where the description has none.
struct NamedRule {
  const RuleInfo& info;
  std::array<PyObject*, std::size(RuleInfo{}.numbers)> numbers;
  std::array<PyObject*, std::size(RuleInfo{}.flags)> flags;
  std::array<PyObject*, std::size(RuleInfo{}.states)> states;

  explicit NamedRule(const RuleInfo& info)
      : info(info), numbers(names_of(info.numbers)), flags(names_of(info.flags)), states(names_of(info.states)) {}

 private:
  template <class Entry, size_t size> static std::array<PyObject*, size> names_of(const Entry (&entries)[size]) {
    std::array<PyObject*, size> found{};
    for (size_t i = 0; i < size && entries[i].name; i++) found[i] = interned(entries[i].name);
    return found;
  }
};

const NamedRule& named_rule(int rule) {
  static const std::vector<NamedRule> all = [] {
    std::vector<NamedRule> made;
    for (int i = 0; i < Rules::size; i++) made.emplace_back(rule_info(i));
    return made;
  }();
  return all[size_t(rule)];
}

PyObject* entry(PyObject* group, PyObject* name) {
  if (!PyDict_Check(group)) {
    throw py::type_error(std::string("fastmlp: a group of the optimizer's param_groups is of type ") +
                         Py_TYPE(group)->tp_name + ", expected a dictionary");
  }
  PyObject* found = item(group, name);
  if (!found) throw py::key_error(py::str(name).cast<std::string>());
  return found;
}

// Of a number or a tensor that holds one; none for what torch would differentiate or has elsewhere.
std::optional<double> number_in(PyObject* object) {
  // Numbers first, because the check for tensors takes longer than all else where it fails.
  if (const std::optional<double> number = number_of(object)) return number;
  if (!THPVariable_Check(object) || !is_plain_on_host(object)) return std::nullopt;
  const at::Tensor& tensor = THPVariable_Unpack(object);
  if (tensor.numel() != 1 || tensor.requires_grad()) return std::nullopt;
  return tensor.item().toDouble();
}

c10::ArrayRef<PyObject*> items(PyObject* sequence) {
  if (!PyList_Check(sequence) && !PyTuple_Check(sequence)) {
    throw py::type_error(std::string("fastmlp: param_groups, params and betas of an optimizer must be lists or tuples, "
                                     "got ") +
                         Py_TYPE(sequence)->tp_name);
  }
  return items_of(sequence);
}

PyObject* groups_of(PyObject* attributes) { return entry(attributes, names().param_groups); }

// The state of parameters that are asked for in the order in which their states were made, as nearly always: a
// dictionary of tensors hashes its keys in Python.
class States {
 public:
  explicit States(PyObject* dict) : dict_(dict) {}

  // Null if there is none yet.
  PyObject* find(PyObject* parameter) {
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t next = at_;
    if (!PyDict_Next(dict_, &next, &key, &value) || key != parameter) {
      in_order_ = false;
      value = PyDict_GET_SIZE(dict_) > 0 ? item(dict_, parameter) : nullptr;
    } else {
      at_ = next;
    }
    return value && PyDict_Check(value) ? value : nullptr;
  }

  // Whether each parameter so far had a state, which came after that of the one before: then none was asked for twice.
  bool in_order() const { return in_order_; }

 private:
  PyObject* dict_;
  Py_ssize_t at_ = 0;
  bool in_order_ = true;
};

// Whether elements of the same index of two tensors of one shape lie at the same place. The stride of a dimension of
// size 1 is never used, and may be anything; so may all strides of a tensor without elements.
bool lies_like(const at::Tensor& tensor, const at::Tensor& like) {
  if (tensor.strides() == like.strides() || like.numel() == 0) return true;
  for (int64_t d = 0; d < like.dim(); d++) {
    if (like.size(d) != 1 && tensor.stride(d) != like.stride(d)) return false;
  }
  return true;
}

// Torch writes what was made under torch.inference_mode there only, and raises elsewhere.
bool may_be_written(const at::Tensor& state) { return !state.is_inference() || c10::InferenceMode::is_enabled(); }

// The larger of two magnitudes, of which infinities and NaN, which every dtype has, do not count.
double larger(double most, double number) { return std::isfinite(number) ? std::max(most, std::abs(number)) : most; }

bool is_counter(PyObject* object) {
  if (!THPVariable_Check(object) || !is_plain_on_host(object)) return false;
  const at::Tensor& tensor = THPVariable_Unpack(object);
  return may_be_written(tensor) && tensor.dim() == 0 &&
         (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble);
}

bool has_updates(c10::Device device) {
  const DeviceOperations* const operations = operations_on(device.type());
  return operations && operations->update;
}

double read_counter(const at::Tensor& counter) {
  return counter.scalar_type() == at::kFloat ? double(*counter.const_data_ptr<float>())
                                             : *counter.const_data_ptr<double>();
}

void write_counter(const at::Tensor& counter, double value) {
  if (counter.scalar_type() == at::kFloat) {
    *counter.mutable_data_ptr<float>() = float(value);
  } else {
    *counter.mutable_data_ptr<double>() = value;
  }
}

// The variables that functions of torch's schedulers see. Held for the life of the process.
PyObject* variables_of_schedulers() {
  static PyObject* const all =
      py::module_::import("torch.optim.lr_scheduler").attr("__dict__").cast<py::object>().release().ptr();
  return all;
}

// Whether a function is what a scheduler of torch puts in the place of an optimizer's step, to know that it was called,
// around this very step. Others may have copied its attributes.
bool is_of_scheduler(PyObject* function, PyObject* step) {
  if (!PyFunction_Check(function) || PyFunction_GET_GLOBALS(function) != variables_of_schedulers()) return false;
  const py::object attributes = attributes_of(function);
  return item(attributes.ptr(), names().marked) && item(attributes.ptr(), names().wrapped) == step;
}

}  // namespace

// The numbers that the parameters of a group share.
struct OptimizerStep::Group {
  const NamedRule& rule;
  UpdateSpec spec;
  bool fits = true;
  double largest = 0;  // a bound of the magnitudes of the numbers, and of 1 less each
  double step = -1;    // that the numbers are of, if they depend on it

  // Parameters of a group have nearly always made as many steps as the one before.
  void at_step(double now) {
    if (rule.info.at_step && step != now) rule.info.at_step(spec, step = now);
  }

  Group(PyObject* group, int kind) : rule(named_rule(kind)) {
    spec.rule = kind;
    for (size_t i = 0; i < rule.numbers.size() && rule.numbers[i]; i++) {
      const NumberEntry& number = rule.info.numbers[i];
      PyObject* const found = entry(group, rule.numbers[i]);
      if (!number.second) {
        set(number.place, found);
      } else if (const auto pair = items(found); pair.size() == 2) {
        set(number.place, pair[0]);
        set(number.second, pair[1]);
      } else {
        fits = false;
      }
    }
    for (size_t i = 0; i < rule.flags.size() && rule.flags[i]; i++) {
      const FlagEntry& flag = rule.info.flags[i];
      const bool is_set = is_true(entry(group, rule.flags[i]));
      if (flag.place) {
        spec.*flag.place = is_set;
      } else {
        fits = fits && !is_set;
      }
    }
  }

 private:
  void set(double UpdateSpec::* place, PyObject* object) {
    const std::optional<double> found = number_in(object);
    spec.*place = found.value_or(0);
    fits = fits && found;
    // Formulas have 1 less the number, too, whose magnitude is at most this.
    largest = larger(largest, 1 + std::abs(spec.*place));
  }
};

static bool some_stands_twice(const py::handle& optimizer) {
  c10::SmallVector<PyObject*, 32> all;
  for_each_parameter(optimizer, [&](PyObject* parameter) { all.push_back(parameter); });
  return has_repeats(all);
}

OptimizerStep::OptimizerStep(const py::handle& optimizer, int rule, GradOf grad_of) {
  const py::object attributes = attributes_of(optimizer.ptr());
  state_ = py::reinterpret_borrow<py::object>(entry(attributes.ptr(), names().state));
  if (!PyDict_Check(state_.ptr())) {
    throw py::type_error(std::string("fastmlp: the state of the optimizer is of type ") +
                         Py_TYPE(state_.ptr())->tp_name + ", expected a dictionary");
  }
  States states(state_.ptr());
  for (PyObject* dict : items(groups_of(attributes.ptr()))) {
    Group group(dict, rule);
    const c10::ArrayRef<PyObject*> parameters = items(entry(dict, names().params));
    if (updates_.empty()) {
      // Most optimizers have one group.
      updates_.reserve(parameters.size());
      grads_.reserve(parameters.size());
    }
    for (PyObject* parameter : parameters) {
      at::Tensor grad = grad_of(parameter);
      if (!grad.defined()) continue;
      if (!group.fits || !add(group, parameter, std::move(grad), states.find(parameter))) left_.push_back(parameter);
    }
  }
  repeats_ = !states.in_order() && some_stands_twice(optimizer);
}

// That of the parameter's state, or a new one; null if it does not lie like the parameter.
const at::Tensor* OptimizerStep::state_tensor(PyObject* parameter, PyObject* state, PyObject* name,
                                              const at::Tensor& like, bool zero) {
  // Torch makes all states of a rule that counts at once, of zeros, and misses what is gone later.
  PyObject* const found = !state ? nullptr : zero ? entry(state, name) : item(state, name);
  if (!found || found == Py_None) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return &missing_.emplace_back(Missing{parameter, name, zero ? at::zeros_like(like) : at::empty_like(like)}).tensor;
  }
  if (!THPVariable_Check(found) || !is_plain(found)) return nullptr;
  const at::Tensor& tensor = THPVariable_Unpack(found);
  TORCH_CHECK(tensor.sizes() == like.sizes(), "fastmlp: the optimizer's state ", py::str(name).cast<std::string>(),
              " has shape ", tensor.sizes(), ", expected that of its parameter, ", like.sizes());
  const bool fits = tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device() &&
                    lies_like(tensor, like) && may_be_written(tensor);
  return fits ? &tensor : nullptr;
}

// The count of a parameter's steps: that of its state, or a new one; null if we cannot count with it.
const at::Tensor* OptimizerStep::counter_of(const Group& group, PyObject* parameter, PyObject* state) {
  if (!state) {
    const bool wide = !group.spec.fused && at::typeMetaToScalarType(at::get_default_dtype()) == at::kDouble;
    const auto options = at::TensorOptions(wide ? at::kDouble : at::kFloat).device(host);
    const at::AutoDispatchBelowADInplaceOrView guard;
    return &missing_.emplace_back(Missing{parameter, names().step, at::zeros({}, options)}).tensor;
  }
  PyObject* const step = entry(state, names().step);
  TORCH_CHECK(!THPVariable_Check(step) || THPVariable_Unpack(step).numel() == 1,
              "fastmlp: the optimizer's state step has more than one element");
  return is_counter(step) ? &THPVariable_Unpack(step) : nullptr;
}

// Finds or makes the states of an update; false if the kernels cannot take them.
bool OptimizerStep::add_states(Group& group, PyObject* parameter, PyObject* state, const at::Tensor& like,
                               Update& update) {
  const NamedRule& rule = group.rule;
  const RuleInfo& info = rule.info;
  if (info.counts) {
    if (state && PyDict_GET_SIZE(state) == 0) state = nullptr;
    const at::Tensor* const counter = counter_of(group, parameter, state);
    if (!counter) return false;
    group.at_step(read_counter(*counter) + 1);
    update.spec = group.spec;
    counters_.push_back(*counter);
  }
  for (size_t i = 0; i < rule.states.size() && rule.states[i]; i++) {
    if (info.states[i].exists && !info.states[i].exists(group.spec)) continue;
    const size_t missing = missing_.size();
    const at::Tensor* const tensor = state_tensor(parameter, state, rule.states[i], like, info.counts);
    if (!tensor) return false;
    update.spec.first = missing_.size() > missing;
    update.state[i] = tensor->data_ptr();
    written_.push_back(*tensor);
  }
  return true;
}

// False, and nothing added, if the kernels cannot take it.
bool OptimizerStep::add(Group& group, PyObject* parameter, at::Tensor grad, PyObject* state) {
  if (!is_plain(parameter)) return false;
  const at::Tensor& p = THPVariable_Unpack(parameter);
  if (updates_.empty() ? !has_updates(p.device()) : p.device() != device_) return false;
  const std::optional<DType> dtype = dtype_of(p.scalar_type());
  if (!dtype || p.is_inference() || !p.is_non_overlapping_and_dense() || !is_plain(grad) ||
      grad.device() != p.device() || grad.scalar_type() != p.scalar_type() || grad.sizes() != p.sizes())
    return false;
  Update& update = updates_.emplace_back();
  update.dtype = *dtype;
  update.n = p.numel();
  update.parameter = p.data_ptr();
  update.spec = group.spec;
  const size_t missing = missing_.size(), written = written_.size(), counters = counters_.size();
  update.grad = grad.const_data_ptr();
  const bool fits = add_states(group, parameter, state, p, update);
  // Torch raises for numbers that the dtype cannot hold.
  if (!fits || larger(group.largest, update.spec.step_size) > largest_of(*dtype)) {
    updates_.pop_back();
    written_.shrink(written);
    counters_.shrink(counters);
    missing_.erase(missing_.begin() + std::ptrdiff_t(missing), missing_.end());
    return false;
  }
  written_.push_back(p);
  if (!lies_like(grad, p)) strays_.emplace_back(grads_.size(), parameter);
  grads_.push_back(std::move(grad));
  device_ = p.device();
  return true;
}

void OptimizerStep::hold(Held& held) const {
  held.take(written_);
  held.take(counters_);
  held.take(grads_);
}

void OptimizerStep::apply() {
  for (const Missing& one : missing_) {
    const auto parameter = py::reinterpret_borrow<py::object>(one.parameter);
    state_[parameter][py::reinterpret_borrow<py::object>(one.name)] = py::cast(one.tensor);
  }
  for (const at::Tensor& counter : at::TensorList(counters_)) {
    write_counter(counter, read_counter(counter) + 1);
    counter.unsafeGetTensorImpl()->bump_version();
  }
  for (const auto& [i, parameter] : strays_) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    grads_[i] = at::empty_like(THPVariable_Unpack(parameter)).copy_(grads_[i]);
    updates_[i].grad = grads_[i].const_data_ptr();
  }
  int64_t elements = 0;
  for (const Update& update : updates_) elements += update.n;
  ReleasedGil released(elements > elements_worth_releasing, [&](Held& held) { hold(held); });
  if (!updates_.empty()) operations_on(device_.type())->update(updates_, device_);
  released.end();
  for (const at::Tensor& tensor : at::TensorList(written_)) tensor.unsafeGetTensorImpl()->bump_version();
}

void for_each_parameter(const py::handle& optimizer, c10::function_ref<void(PyObject*)> visit) {
  const py::object attributes = attributes_of(optimizer.ptr());
  for (PyObject* group : items(groups_of(attributes.ptr()))) {
    for (PyObject* parameter : items(entry(group, names().params))) visit(parameter);
  }
}

// As is_step_watched, of an optimizer with these attributes.
static bool is_watched_by(PyObject* attributes) {
  if (std::any_of(hooks_of_all.begin(), hooks_of_all.end(), filled)) return true;
  if (torch::profiler::impl::profilerEnabled() || !no_mode_is_active()) return true;
  const auto has = [&](PyObject* name) { return item(attributes, name) != nullptr; };
  return std::any_of(names().step_hooks.begin(), names().step_hooks.end(),
                     [&](PyObject* name) { return filled(item(attributes, name)); }) ||
         std::any_of(names().scaler.begin(), names().scaler.end(), has);
}

// Whether the first parameter is on a device that lacks updates. Then nearly always all are, and for torch to move.
static bool begins_elsewhere(PyObject* attributes) {
  for (PyObject* group : items(groups_of(attributes))) {
    for (PyObject* parameter : items(entry(group, names().params)))
      return THPVariable_Check(parameter) && !has_updates(THPVariable_Unpack(parameter).device());
  }
  return false;
}

py::object step_optimizer(const py::handle& optimizer, int rule, bool partly) {
  const py::object attributes = attributes_of(optimizer.ptr());
  if (is_watched_by(attributes.ptr()) || begins_elsewhere(attributes.ptr())) return py::none();
  OptimizerStep step(optimizer, rule, [](PyObject* parameter) { return THPVariable_Unpack(parameter).grad(); });
  if (step.repeats()) return py::none();
  py::list left;
  for (PyObject* parameter : step.left()) left.append(py::reinterpret_borrow<py::object>(parameter));
  if (partly || left.empty()) step.apply();
  return left;
}

void drop_grads(const py::handle& optimizer) {
  for_each_parameter(optimizer, [](PyObject* parameter) {
    const at::Tensor& tensor = THPVariable_Unpack(parameter);
    if (tensor.grad().defined()) tensor.mutable_grad().reset();
  });
}

bool is_step_watched(const py::handle& optimizer) { return is_watched_by(attributes_of(optimizer.ptr()).ptr()); }

bool steps_itself(const py::handle& optimizer, PyObject* step) {
  if (is_step_watched(optimizer) || _PyType_Lookup(Py_TYPE(optimizer.ptr()), names().step) != step) return false;
  PyObject* const own = item(attributes_of(optimizer.ptr()).ptr(), names().step);
  return !own || is_of_scheduler(own, step);
}

void tell_scheduler(const py::handle& optimizer) {
  const py::object attributes = attributes_of(optimizer.ptr());
  if (item(attributes.ptr(), names().step) && PyObject_SetAttr(optimizer.ptr(), names().called, Py_True) < 0)
    throw py::error_already_set();
}

void register_optimizer_hooks(const py::tuple& hooks) {
  for (const py::handle dict : hooks) hooks_of_all.push_back(dict.inc_ref().ptr());
}

}  // namespace fastmlp

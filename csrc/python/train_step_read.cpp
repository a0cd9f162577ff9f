// What train_step.h reads and checks at each call, by lookups in the dictionaries of PyTorch's objects: some tens of
// nanoseconds each. Writes nothing.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "../contract/activation_info.h"
#include "../contract/training_info.h"
#include "../tensors/devices.h"
#include "../tensors/dtypes.h"
#include "../tensors/flattened.h"
#include "objects.h"
#include "route.h"
#include "train_step.h"

namespace fastmlp {
namespace {

// The description of a loss, with names as Python has them: null where the description has none.
struct NamedLoss {
  const LossInfo& info;
  PyObject *number, *index, *weight, *unweighted;

  explicit NamedLoss(const LossInfo& info)
      : info(info),
        number(name_of(info.number.name)),
        index(name_of(info.index)),
        weight(name_of(info.weight)),
        unweighted(name_of(info.unweighted)) {}

 private:
  static PyObject* name_of(const char* name) { return name ? interned(name) : nullptr; }
};

const NamedLoss& named_loss(int kind) {
  static const std::vector<NamedLoss> all = [] {
    std::vector<NamedLoss> made;
    for (int i = 0; i < Losses::size; i++) made.emplace_back(loss_info(i));
    return made;
  }();
  return all[size_t(kind)];
}

bool has_in_class(PyObject* object, PyObject* name, PyObject* expected) {
  return _PyType_Lookup(Py_TYPE(object), name) == expected;
}

// Whether a module computes by the same functions and holds just these children still.
bool holds(PyObject* module, PyObject* expected) {
  constexpr Py_ssize_t functions = 2;
  if (!has_in_class(module, names().forward, PyTuple_GET_ITEM(expected, 0)) ||
      !has_in_class(module, names().call, PyTuple_GET_ITEM(expected, 1)))
    return false;
  const py::object attributes = attributes_of(module);
  PyObject* children = children_of(attributes.ptr());
  if (must_be_called(attributes.ptr()) || !children ||
      functions + PyDict_GET_SIZE(children) != PyTuple_GET_SIZE(expected))
    return false;
  PyObject *key = nullptr, *child = nullptr;
  Py_ssize_t at = 0;
  for (Py_ssize_t i = functions; PyDict_Next(children, &at, &key, &child); i++) {
    if (child != PyTuple_GET_ITEM(expected, i)) return false;
  }
  return true;
}

void check_device(const char* name, const at::Tensor& tensor, const at::Tensor& parameter) {
  TORCH_CHECK(tensor.device() == parameter.device(), "fastmlp: ", name, " is on ", tensor.device(), ", expected ",
              parameter.device(), ", the device of the model's parameters");
}

// Whether a module computes by the same functions and has just these attributes still.
bool is_as_before(PyObject* module, PyObject* expected) {
  if (!has_in_class(module, names().forward, PyTuple_GET_ITEM(expected, 0)) ||
      !has_in_class(module, names().call, PyTuple_GET_ITEM(expected, 1)))
    return false;
  const py::object attributes = attributes_of(module);
  if (must_be_called(attributes.ptr())) return false;
  for (Py_ssize_t i = 2; i + 1 < PyTuple_GET_SIZE(expected); i += 2) {
    if (item(attributes.ptr(), PyTuple_GET_ITEM(expected, i)) != PyTuple_GET_ITEM(expected, i + 1)) return false;
  }
  return true;
}

// A vector of a batch normalisation.
bool is_vector(const at::Tensor& tensor, int64_t features) { return tensor.dim() == 1 && tensor.size(0) == features; }

}  // namespace

bool has_hooks(const at::Tensor& parameter) {
  const auto* meta = torch::autograd::impl::get_autograd_meta(parameter);
  if (!meta) return false;
  const auto node = torch::autograd::impl::try_get_grad_accumulator(parameter);
  if (node && !(node->pre_hooks().empty() && node->post_hooks().empty())) return true;
  if (meta->hooks_.empty() && !meta->post_acc_grad_hooks_) return false;
  // Dictionaries of hooks, which may be empty.
  const py::object object = py::cast(parameter);
  const auto filled = [&](const char* name) {
    const py::object hooks = object.attr(name);
    return !hooks.is_none() && py::len(hooks) > 0;
  };
  return filled("_backward_hooks") || filled("_post_accumulate_grad_hooks");
}

bool TrainStep::read(Call& call) {
  return read_model(call.run) && read_parameters(call) && read_norms(call) && read_features(call) && read_loss(call) &&
         ends_as_expected(call.run) && read_optimizer();
}

// Whether the last layer's rows are what the loss takes: of probabilities, logarithms of a softmax, or any.
bool TrainStep::ends_as_expected(const Run& run) const {
  const char* const expected = loss_info(kind_).follows;
  if (ends_.head != "none") return expected && ends_.head == expected;
  if (!expected) return true;
  const LayerSpec& last = run.layers().back();
  return last.dropout == 0 && activation_info(last.activation.kind).name == std::string_view(expected);
}

bool TrainStep::read_model(Run& run) const {
  if (is_watched()) return false;
  PyObject *module = nullptr, *expected = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(holders_.ptr(), &at, &module, &expected);) {
    if (!holds(module, expected)) return false;
  }
  for (Py_ssize_t at = 0; PyDict_Next(at_ends_.ptr(), &at, &module, &expected);) {
    if (!is_as_before(module, expected)) return false;
  }
  for (PyObject* link : items_of(links_.ptr())) {
    if (!run.extend(link)) return false;
  }
  return !run.empty();
}

bool TrainStep::read_parameters(Call& call) {
  const c10::ArrayRef<PyObject*> objects = call.run.parameters();
  slots_.clear();
  parameters_.clear();
  if (objects.empty()) return false;
  bool any_needed = false;
  const c10::Device device = THPVariable_Unpack(objects[0]).device();
  if (!trains(device.type())) return false;
  for (PyObject* object : objects) {
    call.hold(object);
    if (!is_plain(object)) return false;
    const at::Tensor& parameter = THPVariable_Unpack(object);
    if (parameter.device() != device) return false;
    const at::ScalarType dtype = parameter.scalar_type();
    if ((dtype != at::kFloat && dtype != at::kDouble) || dtype != THPVariable_Unpack(objects[0]).scalar_type() ||
        parameter.is_inference())
      return false;
    Slot& slot = slots_.emplace_back();
    slot.object = object;
    slot.needed = parameter.requires_grad();
    if (slot.needed && (!parameter.is_leaf() || has_hooks(parameter))) return false;
    any_needed |= slot.needed;
    parameters_.push_back(parameter);
  }
  if (!any_needed) return false;
  if (has_repeats(objects)) return false;
  call.stack = call.run.stack();
  return true;
}

// Buffers of batch normalisations.
bool TrainStep::read_norms(Call& call) const {
  if (call.run.norms().empty()) return true;
  c10::SmallVector<PyObject*, 8> buffers;
  const auto read = [&](PyObject* object) -> const at::Tensor& {
    static const at::Tensor none;
    if (!object) return none;
    buffers.push_back(object);
    return is_plain(object) ? THPVariable_Unpack(object) : none;
  };
  const at::Tensor& like = parameters_[0];
  const auto is_statistic = [&](const at::Tensor& tensor) {
    return tensor.defined() && tensor.device() == like.device() && tensor.scalar_type() == like.scalar_type() &&
           tensor.is_contiguous() && !tensor.requires_grad() && !tensor.is_inference();
  };
  for (const RunNorm& norm : call.run.norms()) {
    NormTensors& own = call.norms.emplace_back();
    own.of_batch = norm.of_batch;
    own.eps = norm.eps;
    own.momentum = norm.momentum.value_or(0);
    if (norm.running_mean) {
      own.running_mean = read(norm.running_mean);
      own.running_variance = read(norm.running_variance);
      if (!is_statistic(own.running_mean) || !is_statistic(own.running_variance)) return false;
    }
    if (!norm.batches) continue;
    const at::Tensor& batches = read(norm.batches);
    if (!batches.defined() || batches.numel() != 1 || batches.scalar_type() != at::kLong || batches.device() != host ||
        batches.is_inference())
      return false;
    if (!norm.momentum) own.momentum = 1 / double(*batches.const_data_ptr<int64_t>() + 1);
  }
  for (PyObject* buffer : buffers) call.hold(buffer);
  return !has_repeats(buffers);
}

// How many features go in and come out. False if layers do not go together, or nothing says how many there are.
bool TrainStep::read_features(Call& call) const {
  const Stack& stack = *call.stack;
  int64_t first = -1, now = -1;
  const auto takes = [&](int64_t features) {
    if (first < 0) first = features;
    return now < 0 || now == features;
  };
  size_t norms = 0;
  for (size_t l = 0; l < stack.layers(); l++) {
    const Map map = stack.specs()[l].map;
    if (map == Map::product) {
      const at::Tensor& weight = parameters_[stack.weight(l)];
      if (weight.dim() != 2 || !takes(weight.size(1))) return false;
      now = weight.size(0);
      if (stack.has_bias(l) && !is_vector(parameters_[stack.bias(l)], now)) return false;
    } else if (map == Map::batch_norm) {
      const NormTensors& norm = call.norms[norms++];
      c10::SmallVector<const at::Tensor*, 4> vectors;
      if (stack.has_weight(l)) vectors.push_back(&parameters_[stack.weight(l)]);
      if (stack.has_bias(l)) vectors.push_back(&parameters_[stack.bias(l)]);
      if (norm.running_mean.defined()) vectors.insert(vectors.end(), {&norm.running_mean, &norm.running_variance});
      for (const at::Tensor* vector : vectors) {
        if (vector->dim() != 1 || vector->size(0) == 0 || !takes(vector->size(0))) return false;
        now = vector->size(0);
      }
      if (now == 0) return false;
    }
  }
  call.in_features = first;
  call.out_features = now;
  return first >= 0;
}

bool TrainStep::read_loss(Call& call) const {
  // torch.nn.Module has the __call__ of all losses, and of all other modules.
  if (!has_in_class(loss_.ptr(), names().forward, originals_.forward.ptr()) ||
      !has_in_class(loss_.ptr(), names().call, originals_.call.ptr()))
    return false;
  const NamedLoss& loss = named_loss(kind_);
  const py::object attributes = attributes_of(loss_.ptr());
  if (must_be_called(attributes.ptr())) return false;
  LossSpec& spec = call.spec;
  spec.kind = kind_;
  spec.divisor = double(options_.accumulate);
  PyObject* reduction = item(attributes.ptr(), names().reduction);
  spec.mean = is_text(reduction, "mean");
  if (!spec.mean && !is_text(reduction, "sum")) return false;
  if (loss.number) {
    const std::optional<double> number = number_of(item(attributes.ptr(), loss.number));
    if (!number || !(*number >= loss.info.number.least && *number <= loss.info.number.most)) return false;
    spec.number = *number;
  }
  if (loss.index) {
    const std::optional<int64_t> index = integer_of(item(attributes.ptr(), loss.index));
    if (!index) return false;
    spec.ignore_index = *index;
  }
  if (!loss.weight && !loss.unweighted) return true;
  PyObject* buffers = item(attributes.ptr(), names().buffers);
  if (!buffers || !PyDict_Check(buffers)) return false;
  if (loss.unweighted && item(buffers, loss.unweighted) != Py_None) return false;
  if (!loss.weight) return true;
  // A parameter in place of the buffer stands elsewhere.
  PyObject* given = item(buffers, loss.weight);
  if (given == Py_None) return true;
  if (!given || !is_plain(given)) return false;
  call.weight = THPVariable_Unpack(given);
  if (call.weight.device() != parameters_[0].device()) return false;
  return true;
}

bool TrainStep::read_optimizer() const {
  return has_in_class(optimizer_.ptr(), names().zero_grad, originals_.zero_grad.ptr()) &&
         !item(attributes_of(optimizer_.ptr()).ptr(), names().zero_grad);
}

// Contexts in which the loop would raise, or do something else.
void TrainStep::check_modes(c10::DeviceType device) const {
  TORCH_CHECK(
      !c10::InferenceMode::is_enabled(),
      "fastmlp: TrainStep cannot run under torch.inference_mode, where nothing can be trained: call it outside");
  TORCH_CHECK(at::GradMode::is_enabled(),
              "fastmlp: TrainStep cannot run under torch.no_grad or torch.set_grad_enabled(False), where the loop's "
              "backward() raises: call it outside, or under torch.enable_grad()");
  TORCH_CHECK(!at::autocast::is_autocast_enabled(device),
              "fastmlp: TrainStep cannot run under autocast, which would change the dtype of the layers: call it "
              "outside, or under torch.autocast(\"",
              c10::DeviceTypeName(device, true), "\", enabled=False)");
  TORCH_CHECK(!torch::autograd::AnomalyMode::is_enabled(),
              "fastmlp: TrainStep cannot run under torch.autograd.detect_anomaly, which it would not obey: write the "
              "loop's four lines there");
  TORCH_CHECK(at::SavedTensorDefaultHooks::get_tls_state().stack.empty(),
              "fastmlp: TrainStep cannot run under torch.autograd.graph.saved_tensors_hooks, which it would not call: "
              "call it outside");
}

void TrainStep::check_input(Call& call) const {
  const at::Tensor& input = THPVariable_Unpack(call.input_object);
  const at::Tensor& first = parameters_[0];
  check_device("input", input, first);
  const at::ScalarType dtype = input.scalar_type(), expected = first.scalar_type();
  TORCH_CHECK(dtype == expected, "fastmlp: input has dtype ", dtype_name(dtype),
              ", expected that of the model's parameters, ", dtype_name(expected), ": convert it by input.to(",
              dtype_name(expected), ')');
  TORCH_CHECK(!input.requires_grad(),
              "fastmlp: input requires a gradient, which TrainStep does not compute: give input.detach()");
  const int64_t features = call.in_features;
  TORCH_CHECK(ends_.flattens || !ends_.matrices_only || input.dim() == 2, "fastmlp: input has shape ", input.sizes(),
              ", expected two dimensions, since the model's LogSoftmax takes the second one");
  if (ends_.flattens) {
    check_flattened(input.sizes(), features, "the model's first layer");
  } else {
    TORCH_CHECK(input.dim() >= 1, "fastmlp: input has no dimension, expected at least one, of size ", features,
                ", the features that the model's first layer takes");
    TORCH_CHECK(input.sizes().back() == features, "fastmlp: input has shape ", input.sizes(), ", expected ", features,
                " in the last dimension, the features that the model's first layer takes");
  }
  check_rows(call);
  const char* const why = obstacle(call.input_object, {});
  TORCH_CHECK(!why, "fastmlp: TrainStep cannot run: ", why);
  call.input = c10::MaybeOwned<at::Tensor>::borrowed(input);
  if (!ends_.flattens || input.dim() == 2) return;
  const at::AutoDispatchBelowADInplaceOrView guard;
  call.input = c10::MaybeOwned<at::Tensor>::owned(input.reshape({input.size(0), features}));
}

// What batch normalisation and dropout ask of the input's rows.
void TrainStep::check_rows(const Call& call) const {
  const at::Tensor& input = THPVariable_Unpack(call.input_object);
  const auto norms = call.run.norms();
  if (!norms.empty()) {
    TORCH_CHECK(input.dim() == 2 || ends_.flattens, "fastmlp: input has shape ", input.sizes(), ", expected (N, ",
                call.in_features, "), because BatchNorm1d normalises columns of a batch of rows");
    const bool of_batch = std::any_of(norms.begin(), norms.end(), [](const RunNorm& norm) { return norm.of_batch; });
    TORCH_CHECK(input.size(0) > 0, "fastmlp: input has no rows, expected one at least for BatchNorm1d");
    TORCH_CHECK_VALUE(!of_batch || input.size(0) > 1, "fastmlp: input has one row, expected two at least, because ",
                      "BatchNorm1d in training mode normalises by the variance of the batch");
  }
  // Torch draws in the order of memory. A first layer that is a product makes rows without gaps.
  const c10::ArrayRef<LayerSpec> layers = call.stack->specs();
  if (ends_.flattens || input.is_contiguous()) return;
  for (const LayerSpec& layer : layers) {
    if (layer.map == Map::product) return;
    TORCH_CHECK(layer.dropout == 0, "fastmlp: input has strides ", input.strides(), " for shape ", input.sizes(),
                ", expected rows without gaps, because Dropout comes before the first layer and draws in the order of ",
                "memory: give input.contiguous()");
  }
}

// Finds the target as the loss takes it. The weight of the loss becomes one for each column.
void TrainStep::check_target(Call& call) const {
  check_plain("target", call.target_object);
  const at::Tensor& input = *call.input;
  const at::Tensor& given = THPVariable_Unpack(call.target_object);
  check_device("target", given, parameters_[0]);
  TORCH_CHECK(!given.requires_grad(),
              "fastmlp: target requires a gradient, which TrainStep does not compute: give target.detach()");
  const LossInfo& loss = loss_info(call.spec.kind);
  const int64_t columns = call.out_features;
  at::DimVector output(input.sizes());
  output.back() = columns;
  for (const Reshaping& reshaping : ends_.reshapings) reshaping.apply(output);
  const auto dtype = [&] { return dtype_name(input.scalar_type()); };  // for errors
  if (at::Tensor& weight = call.weight; weight.defined()) {
    const bool fits = weight.dim() == 1 && weight.size(0) == columns && !output.empty() && output.back() == columns;
    const bool one = !loss.takes_classes && weight.numel() == 1;
    TORCH_CHECK(fits || one, "fastmlp: ", loss.weight, " of the loss has shape ", weight.sizes(), ", expected [",
                columns, "], one for each column of the output");
    TORCH_CHECK(weight.scalar_type() == input.scalar_type(), "fastmlp: ", loss.weight, " of the loss has dtype ",
                dtype_name(weight.scalar_type()), ", expected the dtype of the output, ", dtype(),
                ": convert it by loss_fn.to(", dtype(), ')');
    TORCH_CHECK(!weight.requires_grad(), "fastmlp: ", loss.weight,
                " of the loss requires a gradient, which TrainStep does not compute: detach it");
    weight = weight.reshape({-1}).expand({columns}).contiguous();
  }
  if (!loss.takes_classes) {
    TORCH_CHECK(given.sizes() == at::IntArrayRef(output), "fastmlp: target has shape ", given.sizes(), ", expected ",
                at::IntArrayRef(output), ", the shape of the output");
    TORCH_CHECK(given.scalar_type() == input.scalar_type(), "fastmlp: target has dtype ",
                dtype_name(given.scalar_type()), ", expected the dtype of the output, ", dtype(),
                ": convert it by target.to(", dtype(), ')');
    call.target = given.expect_contiguous();
    return;
  }
  TORCH_CHECK(!output.empty() && output.size() <= 2 && output.back() == columns, "fastmlp: ", loss.name,
              " got an output of shape ", at::IntArrayRef(output), ", expected (N, C) or (C) with C = ", columns,
              ", the out_features of the model's last layer");
  const at::IntArrayRef leading(output.data(), output.size() - 1);
  TORCH_CHECK(given.scalar_type() == at::kLong, "fastmlp: target has dtype ", dtype_name(given.scalar_type()),
              ", expected class indices of dtype ", dtype_name(at::kLong));
  TORCH_CHECK(given.sizes() == leading, "fastmlp: target has shape ", given.sizes(), ", expected ", leading,
              ", a class for each row of the output");
  call.target = given.expect_contiguous();  // the device reads the classes, and checks them
}

}  // namespace fastmlp

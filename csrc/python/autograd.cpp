// The node of autograd.h, as a torch::autograd::Function: an eighth of the cost per call of one that
// is written in Python.
#include "autograd.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/utils/pybind.h>

#include <tuple>

#include "../tensors/checks.h"
#include "../tensors/devices.h"
#include "gil.h"
#include "route.h"

namespace fastmlp {
namespace {

PyObject* composed_backward = nullptr;

constexpr int sigmoid_kind = kind_in<Sigmoid>(Activations{}), tanh_kind = kind_in<Tanh>(Activations{});

c10::DispatchKey autocast_key(const at::Tensor& input) { return operations_for(input).autocast; }

bool is_dual(const at::Tensor& tensor) { return tensor._fw_grad(0).defined(); }

Tensors backward_in_python(const Stack& stack, const std::vector<bool>& needs, const at::Tensor& grad,
                           const at::Tensor& input, const Tensors& parameters, const Tensors& saved) {
  const py::gil_scoped_acquire acquire;
  const auto function = py::reinterpret_borrow<py::function>(composed_backward);
  const LayerLists lists(stack.specs());
  const py::object found =
      function(lists.has_bias, lists.activations, lists.scalars, lists.dropouts, needs, grad, input, parameters, saved);
  Tensors gradients;
  for (const py::handle gradient : found) {
    gradients.push_back(gradient.is_none() ? at::Tensor() : gradient.cast<at::Tensor>());
  }
  return gradients;
}

// Under create_graph: one layer without dropout, which saved its output with the graph.
Tensors backward_of_layer(const Stack& stack, const std::vector<bool>& needs, const at::Tensor& grad,
                          const at::Tensor& input, const Tensors& parameters, const Tensors& saved) {
  const int kind = stack.activation(0).kind;
  const at::Tensor gradient = saved.empty() ? grad : gradient_from_output(kind, grad, saved[0]);
  Tensors gradients(1 + parameters.size());
  if (needs[0]) gradients[0] = gradient.mm(parameters[0]);
  if (needs[1]) gradients[1] = gradient.t().mm(input);
  if (stack.has_bias(0) && needs[2]) gradients[2] = gradient.sum(0);
  return gradients;
}

struct FusedNetwork : torch::autograd::Function<FusedNetwork> {
  // `known`, if not null, is what forward of one layer would compute.
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& input,
                            at::TensorList parameters, const c10::intrusive_ptr<Stack>& stack,
                            const at::Tensor* known) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, hidden] =
        known ? std::tuple(known->variable_data(), Tensors()) : fastmlp::forward(*stack, input, parameters);
    Tensors saved{input};
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    saved.insert(saved.end(), hidden.begin(), hidden.end());
    // The output itself only where the derivative is taken from it.
    if (hidden.size() < stack->saved()) saved.push_back(output);
    context->save_for_backward(std::move(saved));
    context->saved_data["stack"] = c10::IValue::make_capsule(stack);
    return output;
  }

  static Tensors backward(torch::autograd::AutogradContext* context, const Tensors& grads) {
    const auto capsule = context->saved_data["stack"].toCapsule();
    const Stack& stack = static_cast<const Stack&>(*capsule);
    const Tensors tensors = context->get_saved_variables();
    const auto parameters_end = tensors.begin() + 1 + stack.parameters();
    const Tensors parameters(tensors.begin() + 1, parameters_end);
    const Tensors saved(parameters_end, tensors.end());
    std::vector<bool> needs;
    for (size_t i = 0; i <= stack.parameters(); i++) needs.push_back(context->needs_input_grad(i));

    Tensors gradients;
    if (!at::GradMode::is_enabled() && !is_dual(grads[0]) && are_plain(grads, tensors)) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      gradients = fastmlp::backward(stack, grads[0], tensors[0], saved, parameters, needs);
    } else if (stack.layers() == 1 && stack.masks() == 0 && tensors[0].dim() == 2 &&
               has_gradient_from_output(stack.activation(0).kind)) {
      const c10::impl::ExcludeDispatchKeyGuard guard(autocast_key(tensors[0]));
      gradients = backward_of_layer(stack, needs, grads[0], tensors[0], parameters, saved);
    } else {
      gradients = backward_in_python(stack, needs, grads[0], tensors[0], parameters, saved);
    }
    gradients.resize(gradients.size() + 2);  // for the stack and what is known
    return gradients;
  }
};

// As torch hands them to a linear layer, from its cache; the same tensor where it is none of autocast's dtypes.
at::Tensor cast(const at::Tensor& tensor, c10::DeviceType device) {
  const at::ScalarType dtype = at::autocast::get_lower_precision_fp_from_device_type(device);
  const at::Tensor lower = at::autocast::cached_cast(dtype, tensor, device);
  // The cache may hold what a region around this one, of another dtype, has cast.
  return lower.scalar_type() == dtype || lower.is_same(tensor) ? lower : tensor.to(dtype);
}

// After an error: if it was about the arguments this raises it again, with the names that the module has for them.
void check_in_words_of_module(const Stack& stack, const at::Tensor& input, at::TensorList parameters, NamesOf names) {
  if (!names) return;
  const ModuleNames called = names();
  check_forward(stack, input, parameters, true, &called);
}

}  // namespace

bool autocast_is_active(const at::Tensor& input) {
  return !c10::impl::tls_local_dispatch_key_set().excluded_.has(autocast_key(input));
}

at::Tensor run(const c10::intrusive_ptr<Stack>& stack, const at::Tensor& input, at::TensorList parameters,
               NamesOf names) {
  if (autocast_is_active(input)) {
    const c10::impl::ExcludeDispatchKeyGuard guard(autocast_key(input));
    const c10::DeviceType device = input.device().type();
    Tensors lower;
    for (const at::Tensor& parameter : parameters) lower.push_back(cast(parameter, device));
    return run(stack, cast(input, device), lower, names);
  }
  bool graph = input.requires_grad();
  for (const at::Tensor& parameter : parameters) graph = graph || parameter.requires_grad();
  ReleasedGil released(multiply_adds(parameters, input) > worth_releasing, [&](Held& held) {
    held.take(input);
    held.take(parameters);
  });
  try {
    if (graph && at::GradMode::is_enabled()) return FusedNetwork::apply(input, parameters, stack, nullptr);
    const at::AutoDispatchBelowADInplaceOrView guard;
    return infer(*stack, input, parameters);
  } catch (const c10::Error&) {
    released.end();
    check_in_words_of_module(*stack, input, parameters, names);
    throw;
  }
}

bool has_gradient_from_output(int kind) {
  return kind == identity_kind || kind == relu_kind || kind == sigmoid_kind || kind == tanh_kind;
}

at::Tensor gradient_from_output(int kind, const at::Tensor& grad, const at::Tensor& output) {
  if (kind == relu_kind) return at::threshold_backward(grad, output, 0);
  if (kind == sigmoid_kind) return at::sigmoid_backward(grad, output);
  if (kind == tanh_kind) return at::tanh_backward(grad, output);
  return grad;
}

at::Tensor with_graph(const c10::intrusive_ptr<Stack>& stack, const at::Tensor& input, at::TensorList parameters,
                      const at::Tensor& output) {
  check_forward(*stack, input, parameters);
  TORCH_CHECK(stack->hidden() == 0, "fastmlp: expected one layer that keeps no pre-activation");
  return FusedNetwork::apply(input, parameters, stack, &output);
}

void name_node() {
  static PyTypeObject type;
  PyTypeObject* const ready =
      torch::autograd::_initFunctionPyTypeObject(type, "FusedNetworkBackward", nullptr, nullptr);
  torch::autograd::registerCppFunction(typeid(torch::autograd::CppNode<FusedNetwork>), ready);
}

void set_composed_backward(PyObject* function) {
  Py_XINCREF(function);
  Py_XDECREF(composed_backward);
  composed_backward = function;
}

}  // namespace fastmlp

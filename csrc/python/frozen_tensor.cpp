// A frozen network called with a tensor: checks it and the `out` that may come with it, before anything is written.
// Called by frozen.cpp with the GIL. Must not go through the dispatcher, which would take as long as a small network.
#include <ATen/core/Tensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>
#include <utility>

#include "../tensors/dtypes.h"
#include "frozen_call.h"
#include "gil.h"
#include "route.h"

namespace fastmlp::frozen {
namespace {

at::Tensor flattened(const at::Tensor& input, int64_t rows, const Call& call) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return input.reshape({rows, call.network->form().in_features()});
}

// An output in the shape that the last layer gives it.
at::Tensor as_of_layer(const at::Tensor& output, const at::Tensor& input, const Call& call) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  at::DimVector shape(input.sizes());
  shape.back() = call.network->form().out_features();
  return output.view(shape);
}

void run(const Call& call, const View& x, const at::Tensor& input, const at::Tensor& output, void* data) {
  if (call.network->form().takes_arrays) return run_on_host(call, x, data);
  // Handles of its own: without the GIL others may drop what the caller gave.
  const at::Tensor own_input = call.flattens ? flattened(input, x.sizes[0], call) : input;
  const at::Tensor own_output = call.reshapings ? as_of_layer(output, own_input, call) : output;
  const ReleasedGil released = release_for(call, x.rows());
  call.network->run({x, data, &own_input, &own_output});
}

void check_plain(const Call& call, const TensorArgument& given) {
  const auto& [name, object] = given;
  const at::Tensor& tensor = THPVariable_Unpack(object);
  TORCH_CHECK(tensor.defined(), "fastmlp: ", name, " is an undefined tensor");
  TORCH_CHECK(tensor.layout() == at::kStrided, "fastmlp: ", name,
              " has another layout than torch.strided; pass a dense tensor (", name, ".to_dense())");
  TORCH_CHECK(tensor.device() == call.device(), "fastmlp: ", name, " is on ", tensor.device(), ", expected ",
              call.device(), ", the device of the frozen network");
  const char* why = obstacle(object, {});
  TORCH_CHECK(!why, "fastmlp: a frozen network takes plain tensors, outside of transforms and modes, but ", why,
              "; call the model that it was made from");
}

void check_dtype(const Call& call, const TensorArgument& given, bool is_out) {
  const at::ScalarType own = THPVariable_Unpack(given.object).scalar_type();
  if (own == call.dtype()) return;
  const std::string remedy = is_out                   ? std::string("; make it with dtype=") + dtype_name(call.dtype())
                             : at::isComplexType(own) ? std::string()
                                                      : dtype_remedy(call, own, given.name + cast_to(call.dtype()));
  TORCH_CHECK(false, "fastmlp: ", given.name, " has dtype ", dtype_name(own), ", expected ", dtype_name(call.dtype()),
              ", the dtype of the frozen network", remedy);
}

const std::string input_name = "input", out_name = "out";

bool is_alike(const Call& call, PyObject* object) {
  const at::Tensor& tensor = THPVariable_Unpack(object);
  return tensor.scalar_type() == call.dtype() && tensor.device() == call.device();
}

// Whether check_tensors has nothing to say of these: the common case, which is spared that call.
bool are_fine(const Call& call, PyObject* input, PyObject* out) {
  if (!is_alike(call, input) || (out && !is_alike(call, out))) return false;
  if (obstacle(input, out ? c10::ArrayRef<PyObject*>(out) : c10::ArrayRef<PyObject*>())) return false;
  return !(THPVariable_Unpack(input).requires_grad() && c10::GradMode::is_enabled());
}

inline void read_view(const at::Tensor& input, View& x) {
  x.dims = int(input.dim());
  check_dimensions(x.dims);
  const int64_t element = input.element_size();
  for (int d = 0; d < x.dims; d++) {
    x.sizes[d] = input.size(d);
    x.steps[d] = input.stride(d) * element;
  }
  x.data = static_cast<const char*>(input.const_data_ptr());
}

inline void check_writable(const std::string& name, const at::Tensor& output, c10::IntArrayRef shape) {
  TORCH_CHECK(output.sizes() == shape, "fastmlp: ", name, " has shape ", output.sizes(), ", expected ", shape);
  TORCH_CHECK(output.is_contiguous(), "fastmlp: ", name, " has strides ", output.strides(),
              ", expected a contiguous tensor");
  TORCH_CHECK(!(output.requires_grad() && c10::GradMode::is_enabled()), "fastmlp: ", name,
              " requires grad, but a frozen network has no gradients");
  TORCH_CHECK(!output.is_inference() || c10::InferenceMode::is_enabled(), "fastmlp: ", name,
              " is an inference tensor, which may be written in torch.inference_mode() only");
}

}  // namespace

void check_tensors(const Call& call, c10::ArrayRef<TensorArgument> inputs, c10::ArrayRef<TensorArgument> outs) {
  for (const TensorArgument& input : inputs) check_dtype(call, input, false);
  constexpr size_t few = 16;
  PyObject* others[few];
  size_t count = 0;
  bool plain = inputs.size() + outs.size() <= few;
  const auto look = [&](const TensorArgument& given) {
    plain = plain && THPVariable_Unpack(given.object).device() == call.device();
    if (plain) others[count++] = given.object;
  };
  for (const TensorArgument& input : inputs) look(input);
  for (const TensorArgument& out : outs) look(out);
  if (!plain || obstacle(others[0], c10::ArrayRef<PyObject*>(others + 1, count - 1))) {
    for (const TensorArgument& input : inputs) check_plain(call, input);
    for (const TensorArgument& out : outs) check_plain(call, out);
  }
  for (const TensorArgument& input : inputs) {
    TORCH_CHECK(!(THPVariable_Unpack(input.object).requires_grad() && c10::GradMode::is_enabled()),
                "fastmlp: ", input.name, " requires grad, but a frozen network has no gradients; pass ", input.name,
                ".detach(), or call it under torch.no_grad()");
  }
  for (const TensorArgument& out : outs) check_dtype(call, out, true);
}

View view_of_tensor(PyObject* object) {
  View x;
  read_view(THPVariable_Unpack(object), x);
  return x;
}

void* memory_of_tensor(const TensorArgument& out, c10::IntArrayRef shape) {
  const at::Tensor& output = THPVariable_Unpack(out.object);
  check_writable(out.name, output, shape);
  return output.mutable_data_ptr();
}

void count_change(PyObject* out) {
  const at::Tensor& output = THPVariable_Unpack(out);
  if (!output.is_inference()) output.unsafeGetTensorImpl()->bump_version();
}

PyObject* call_tensor(const Call& call, PyObject* object, PyObject* out) {
  const at::Tensor& input = THPVariable_Unpack(object);
  const TensorArgument given{input_name, object}, into{out_name, out};
  const bool fine = are_fine(call, object, out);
  if (!fine) check_tensors(call, given, out ? c10::ArrayRef<TensorArgument>(into) : c10::ArrayRef<TensorArgument>());
  View x;
  read_view(input, x);
  check_shape(call, x);
  const View result = result_of(call, x);
  if (!out) {
    at::Tensor output = call.network->empty(result.shape());
    run(call, x, input, output, output.data_ptr());
    return THPVariable_Wrap(std::move(output));
  }
  const at::Tensor& output = THPVariable_Unpack(out);
  check_writable(out_name, output, result.shape());
  void* const data = output.mutable_data_ptr();
  check_apart(x, static_cast<const char*>(data), int64_t(output.nbytes()), input.element_size());
  if (!output.is_inference()) output.unsafeGetTensorImpl()->bump_version();
  run(call, x, input, output, data);
  return Py_NewRef(out);
}

}  // namespace fastmlp::frozen

// A frozen network called with a tensor: checks it and the `out` that may come with it, before anything is written.
// Called by frozen.cpp with the GIL. Must not go through the dispatcher, which would take as long as a small network.
#include <ATen/core/Tensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>
#include <string_view>
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

void check_plain(const Call& call, const char* name, PyObject* object) {
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

std::string remedy(const Call& call, const char* name, at::ScalarType given) {
  if (name == std::string_view("out")) return std::string("; make it with dtype=") + dtype_name(call.dtype());
  return at::isComplexType(given) ? "" : dtype_remedy(call, given, "input" + cast_to(call.dtype()));
}

void check_dtype(const Call& call, const char* name, const at::Tensor& tensor) {
  const at::ScalarType own = tensor.scalar_type();
  TORCH_CHECK(own == call.dtype(), "fastmlp: ", name, " has dtype ", dtype_name(own), ", expected ",
              dtype_name(call.dtype()), ", the dtype of the frozen network", remedy(call, name, own));
}

}  // namespace

PyObject* call_tensor(const Call& call, PyObject* object, PyObject* out) {
  const at::Tensor& input = THPVariable_Unpack(object);
  check_dtype(call, "input", input);
  const auto is_there = [&](PyObject* tensor) { return THPVariable_Unpack(tensor).device() == call.device(); };
  const bool plain = !obstacle(object, out ? c10::ArrayRef<PyObject*>(out) : c10::ArrayRef<PyObject*>()) &&
                     is_there(object) && (!out || is_there(out));
  if (!plain) {
    check_plain(call, "input", object);
    if (out) check_plain(call, "out", out);
  }
  TORCH_CHECK(!(input.requires_grad() && c10::GradMode::is_enabled()),
              "fastmlp: input requires grad, but a frozen network has no gradients; pass input.detach(), or call it "
              "under torch.no_grad()");
  View x;
  x.dims = int(input.dim());
  check_dimensions(x.dims);
  const int64_t element = input.element_size();
  for (int d = 0; d < x.dims; d++) {
    x.sizes[d] = input.size(d);
    x.steps[d] = input.stride(d) * element;
  }
  check_shape(call, x);
  x.data = static_cast<const char*>(input.const_data_ptr());
  const View result = result_of(call, x);
  if (!out) {
    at::Tensor output = call.network->empty(result.shape());
    run(call, x, input, output, output.data_ptr());
    return THPVariable_Wrap(std::move(output));
  }
  const at::Tensor& output = THPVariable_Unpack(out);
  check_dtype(call, "out", output);
  TORCH_CHECK(output.sizes() == result.shape(), "fastmlp: out has shape ", output.sizes(), ", expected ",
              result.shape());
  TORCH_CHECK(output.is_contiguous(), "fastmlp: out has strides ", output.strides(), ", expected a contiguous tensor");
  TORCH_CHECK(!(output.requires_grad() && c10::GradMode::is_enabled()),
              "fastmlp: out requires grad, but a frozen network has no gradients");
  TORCH_CHECK(!output.is_inference() || c10::InferenceMode::is_enabled(),
              "fastmlp: out is an inference tensor, which may be written in torch.inference_mode() only");
  void* const data = output.mutable_data_ptr();
  check_apart(x, static_cast<const char*>(data), int64_t(output.nbytes()), element);
  if (!output.is_inference()) output.unsafeGetTensorImpl()->bump_version();
  run(call, x, input, output, data);
  return Py_NewRef(out);
}

}  // namespace fastmlp::frozen

// The rule of route.h, by comparison of dispatch key sets.
#include "route.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>

#include "../tensors/devices.h"
#include "../tensors/passes.h"

namespace fastmlp {
namespace {

PyObject* device_context = nullptr;
PyObject* forward_ad = nullptr;  // the dictionary of torch.autograd.forward_ad
PyObject* current_level = nullptr;

// Levels are counted in Python only.
bool forward_mode_is_open() {
  PyObject* level = PyDict_GetItem(forward_ad, current_level);
  return !level || PyLong_AsLong(level) >= 0;
}

// torch.set_default_device and `with torch.device(...)` are modes too, but change factories only.
// Asked in backward too, without the GIL.
bool only_default_devices() {
  for (int64_t i = 0; i < at::impl::PythonTorchFunctionTLS::stack_len(); i++) {
    PyObject* mode = at::impl::PythonTorchFunctionTLS::get_stack_at(i)->ptr(getPyInterpreter());
    if (reinterpret_cast<PyObject*>(Py_TYPE(mode)) != device_context) return false;
  }
  return true;
}

// Autocast is none: `run` casts first. Raw representations are compared, since operator- of key sets keeps backend
// bits.
const char* mode_obstacle() {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  static const uint64_t usual =
      (c10::default_included_set | c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView)).raw_repr();
  if (at::impl::torch_function_mode_enabled() && !only_default_devices()) return "a torch function mode is active";
  if ((keys.included_.raw_repr() & ~usual) != 0) return "a functorch transform, dispatch mode or tracer is active";
  return nullptr;
}

// The keys of a plain tensor of a backend.
uint64_t usual_keys(c10::DispatchKey backend, c10::DispatchKey autograd) {
  return (c10::DispatchKeySet({backend, autograd, c10::DispatchKey::ADInplaceOrView}) | c10::autocast_dispatch_keyset)
      .raw_repr();
}

const char* key_obstacle(const at::Tensor& tensor) {
  static const uint64_t usual_on_cpu = usual_keys(c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU);
  static const uint64_t usual_on_cuda = usual_keys(c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCUDA);
  const c10::DispatchKeySet keys = tensor.key_set();
  const bool on_cpu = keys.has_all(c10::DispatchKeySet(c10::DispatchKey::CPU));
  if (!on_cpu) {
    if (const char* why = device_obstacle(tensor.device())) return why;
  }
  if ((keys.raw_repr() & ~(on_cpu ? usual_on_cpu : usual_on_cuda)) != 0)
    return "a tensor is wrapped, sparse, conjugated or otherwise special";
  return nullptr;
}

const char* tensor_obstacle(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return "a tensor is of a subclass of torch.Tensor";
  return key_obstacle(THPVariable_Unpack(object));
}

}  // namespace

void prepare_routes() {
  device_context = py::object(py::module_::import("torch.utils._device").attr("DeviceContext")).release().ptr();
  forward_ad = py::object(py::module_::import("torch.autograd.forward_ad").attr("__dict__")).release().ptr();
  current_level = PyUnicode_InternFromString("_current_level");
}

const char* obstacle(PyObject* input, c10::ArrayRef<PyObject*> parameters) {
  if (forward_mode_is_open()) return "a level of forward-mode AD is open";
  if (const char* why = mode_obstacle()) return why;
  if (const char* why = tensor_obstacle(input)) return why;
  if (!dtype_of(THPVariable_Unpack(input).scalar_type())) return "there are no kernels for the dtype";
  for (PyObject* parameter : parameters) {
    if (const char* why = tensor_obstacle(parameter)) return why;
  }
  return nullptr;
}

bool is_plain(PyObject* object) { return !tensor_obstacle(object) && THPVariable_Unpack(object).device().is_cpu(); }

void check_plain(const char* name, PyObject* object) {
  TORCH_CHECK_TYPE(THPVariable_Check(object), "fastmlp: ", name, " must be a torch.Tensor, got ",
                   Py_TYPE(object)->tp_name);
  const at::Tensor& tensor = THPVariable_Unpack(object);
  TORCH_CHECK(tensor.device().is_cpu(), "fastmlp: ", name, " is on ", tensor.device(), ", expected the CPU");
  const char* const why = tensor_obstacle(object);
  TORCH_CHECK(!why, "fastmlp: ", name, " must be a plain tensor: ", why);
}

bool is_plain(const at::Tensor& tensor) { return tensor.device().is_cpu() && !key_obstacle(tensor); }

bool no_mode_is_active() { return !mode_obstacle(); }

bool are_plain(at::TensorList incoming, at::TensorList saved) {
  const auto plain = [](const at::Tensor& tensor) { return !key_obstacle(tensor); };
  return !mode_obstacle() && std::all_of(incoming.begin(), incoming.end(), plain) &&
         std::all_of(saved.begin(), saved.end(), plain);
}

}  // namespace fastmlp

// The rule of route.h: compares the dispatch keys of a tensor with those that its device has in the table of devices.
// Called by all of csrc/python. Must not allocate, and must name no device.
#include "route.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>

#include "../tensors/devices.h"
#include "../tensors/dtypes.h"

namespace fastmlp {
namespace {

PyObject* device_context = nullptr;
PyObject* forward_ad = nullptr;  // the dictionary of torch.autograd.forward_ad
PyObject* current_level = nullptr;
// The keys of a plain tensor on the host, those of them of which it has at least one, and those that a thread includes
// where nothing watches. Not statics of the functions that read them, which would ask each time whether they are there.
uint64_t plain_host_keys = 0, host_backend_keys = 0, usual_keys = 0;

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
  if (at::impl::torch_function_mode_enabled() && !only_default_devices()) return "a torch function mode is active";
  if ((keys.included_.raw_repr() & ~usual_keys) != 0) return "a functorch transform, dispatch mode or tracer is active";
  return nullptr;
}

// Whether the keys of a tensor say that it is one of the host's and plain, which is asked first because most are.
bool has_plain_host_keys(const at::Tensor& tensor) {
  const uint64_t keys = tensor.key_set().raw_repr();
  return (keys & ~plain_host_keys) == 0 && (keys & host_backend_keys) != 0;
}

const char* key_obstacle(const at::Tensor& tensor) {
  if (has_plain_host_keys(tensor)) return nullptr;
  const c10::Device device = tensor.device();
  const DeviceOperations* const operations = operations_on(device.type());
  if (!operations || operations->obstacle) {
    if (const char* why = device_obstacle(device)) return why;
  }
  if ((tensor.key_set().raw_repr() & ~operations->plain_keys.raw_repr()) != 0)
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
  plain_host_keys = operations_on(host.type())->plain_keys.raw_repr();
  host_backend_keys = plain_host_keys & c10::full_backend_mask;
  usual_keys = (c10::default_included_set | c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView)).raw_repr();
}

// Levels are counted in Python only.
bool forward_mode_is_open() {
  PyObject* level = PyDict_GetItemWithError(forward_ad, current_level);  // no error, since keys are texts
  return !level || PyLong_AsLong(level) >= 0;
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

bool is_plain(PyObject* object) { return !tensor_obstacle(object); }

bool is_plain(const at::Tensor& tensor) { return !key_obstacle(tensor); }

bool is_plain_on_host(PyObject* object) {
  return THPVariable_CheckExact(object) && has_plain_host_keys(THPVariable_Unpack(object));
}

void check_plain(const char* name, PyObject* object) {
  TORCH_CHECK_TYPE(THPVariable_Check(object), "fastmlp: ", name, " must be a torch.Tensor, got ",
                   Py_TYPE(object)->tp_name);
  const at::Tensor& tensor = THPVariable_Unpack(object);
  TORCH_CHECK(trains(tensor.device().type()), "fastmlp: ", name, " is on ", tensor.device(), ", expected ",
              devices_in_words(&trains));
  const char* const why = tensor_obstacle(object);
  TORCH_CHECK(!why, "fastmlp: ", name, " must be a plain tensor: ", why);
}

bool no_mode_is_active() { return !mode_obstacle(); }

bool are_plain(at::TensorList incoming, at::TensorList saved) {
  const auto all_plain = [](at::TensorList tensors) {
    return std::all_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return is_plain(tensor); });
  };
  return !mode_obstacle() && all_plain(incoming) && all_plain(saved);
}

}  // namespace fastmlp

// The looks of frozen_watch.h.
#include "frozen_watch.h"

#include <torch/csrc/autograd/python_variable.h>

namespace fastmlp {
namespace {

struct Names {
  PyObject* modules = PyUnicode_InternFromString("_modules");
  PyObject* parameters = PyUnicode_InternFromString("_parameters");
  PyObject* buffers = PyUnicode_InternFromString("_buffers");
};
const Names& names() {
  static const Names all;
  return all;
}

PyObject* item(PyObject* dict, PyObject* key) {
  if (!dict || !PyDict_Check(dict)) return nullptr;
  PyObject* found = PyDict_GetItemWithError(dict, key);
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

// Borrowed: modules keep their dictionaries.
PyObject* attributes_of(PyObject* module) {
  PyObject* dict = PyObject_GenericGetDict(module, nullptr);
  if (!dict) throw py::error_already_set();
  Py_DECREF(dict);
  return dict;
}

// Inference tensors do not count theirs.
uint32_t version_of(const c10::TensorImpl& tensor) {
  return tensor.version_counter().enabled() ? tensor.version_counter().current_version() : 0;
}

c10::StorageImpl* storage_of(const c10::TensorImpl& tensor) {
  return tensor.has_storage() ? tensor.unsafe_storage().unsafeGetStorageImpl() : nullptr;
}

// Where a tensor's elements begin, as a number to compare: not for reading.
const void* data_of(const c10::TensorImpl& tensor, const c10::StorageImpl& storage) {
  const auto offset = tensor.storage_offset() * int64_t(tensor.dtype().itemsize());
  return static_cast<const char*>(storage.data()) + offset;
}

}  // namespace

Watch::Value::Value(py::object name, PyObject* object) : name(std::move(name)) {
  if (!THPVariable_Check(object)) return;
  const auto& impl = THPVariable_Unpack(object).getIntrusivePtr();
  tensor.emplace(impl);
  version = version_of(*impl);
  if (c10::StorageImpl* own = storage_of(*impl)) {
    storage.emplace(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(own));
    data = data_of(*impl, *own);
  }
}

bool Watch::Value::is(PyObject* object) const {
  if (!object || !THPVariable_Check(object)) return !tensor && object == Py_None;
  const c10::TensorImpl* impl = THPVariable_Unpack(object).unsafeGetTensorImpl();
  if (!tensor || tensor->_unsafe_get_target() != impl || version_of(*impl) != version) return false;
  const c10::StorageImpl* own = storage_of(*impl);
  if (!own || !storage) return !own && !storage;
  return storage->_unsafe_get_target() == own && data_of(*impl, *own) == data;
}

Watch::Watch(const py::list& modules) {
  for (const py::handle entry : modules) {
    const auto tuple = py::reinterpret_borrow<py::tuple>(entry);
    const auto intern = [](const py::handle& text) {
      PyObject* name = text.inc_ref().ptr();
      PyUnicode_InternInPlace(&name);
      return py::reinterpret_steal<py::object>(name);
    };
    Module module;
    module.parent = tuple[0].cast<size_t>();
    module.name = intern(tuple[1]);
    const py::object object = tuple[2];
    module.reference = py::reinterpret_steal<py::object>(PyWeakref_NewRef(object.ptr(), nullptr));
    if (!module.reference) throw py::error_already_set();
    module.children = tuple[3].cast<Py_ssize_t>();
    PyObject* const attributes = attributes_of(object.ptr());
    const auto values = [&](const py::handle& wanted, PyObject* kind) {
      std::vector<Value> found;
      for (const py::handle name : wanted) {
        PyObject* value = item(item(attributes, kind), name.ptr());
        found.emplace_back(intern(name), value ? value : Py_None);
      }
      return found;
    };
    module.parameters = values(tuple[4], names().parameters);
    module.buffers = values(tuple[5], names().buffers);
    if (!modules_.empty()) modules_[module.parent].is_parent = true;
    modules_.push_back(std::move(module));
  }
  children_.resize(modules_.size());
}

void Watch::renew() {
  for (Module& m : modules_) {
    PyObject* const module = PyWeakref_GetObject(m.reference.ptr());
    if (module == Py_None) continue;  // the next look sees that
    const auto take = [&](std::vector<Value>& values, PyObject* kind) {
      for (Value& value : values) {
        PyObject* const object = item(item(attributes_of(module), kind), value.name.ptr());
        value = Value(value.name, object ? object : Py_None);
      }
    };
    take(m.parameters, names().parameters);
    take(m.buffers, names().buffers);
  }
}

bool Watch::same(const std::vector<Value>& values, PyObject* attributes, PyObject* kind) {
  if (values.empty()) return true;
  PyObject* const dict = item(attributes, kind);
  for (const Value& value : values) {
    if (!value.is(item(dict, value.name.ptr()))) return false;
  }
  return true;
}

Watch::Finding Watch::look() {
  for (size_t i = 0; i < modules_.size(); i++) {
    const Module& m = modules_[i];
    PyObject* const module = PyWeakref_GetObject(m.reference.ptr());
    if (i == 0 && module == Py_None) return Finding::gone;
    if (i > 0 && item(children_[m.parent], m.name.ptr()) != module) return Finding::other_modules;
    if (!m.is_parent && m.children < 0 && m.parameters.empty() && m.buffers.empty()) continue;
    PyObject* const attributes = attributes_of(module);
    if (m.is_parent || m.children >= 0) {
      children_[i] = item(attributes, names().modules);
      if (!children_[i]) return Finding::other_modules;
      if (m.children >= 0 && PyDict_Size(children_[i]) != m.children) return Finding::other_modules;
    }
    if (!same(m.parameters, attributes, names().parameters) || !same(m.buffers, attributes, names().buffers))
      return Finding::other_values;
  }
  return Finding::unchanged;
}

}  // namespace fastmlp

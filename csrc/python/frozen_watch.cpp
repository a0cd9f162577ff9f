// Detects that a frozen model changed: compares each module's class, hooks and attributes, and each tensor's counter,
// storage and form, with those that were recorded before the model was read. Called by frozen.cpp and fastmlp/frozen.py
// with the GIL; a look must not run code of Python.
#include "frozen_watch.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>

#include "modules.h"
#include "objects.h"

namespace fastmlp {
namespace {

py::object interned(const py::handle& text) {
  PyObject* name = text.inc_ref().ptr();
  PyUnicode_InternInPlace(&name);
  return py::reinterpret_steal<py::object>(name);
}

// Null if the object is gone.
PyObject* target_of(const py::object& reference) {
  PyObject* const object = PyWeakref_GetObject(reference.ptr());
  return object == Py_None ? nullptr : object;
}

py::object weak(PyObject* object) {
  auto reference = py::reinterpret_steal<py::object>(PyWeakref_NewRef(object, nullptr));
  if (!reference) throw py::error_already_set();
  return reference;
}

// A counter has no name but its address.
const void* address_of(const c10::VariableVersion& counter) {
  static_assert(sizeof(counter) == sizeof(void*), "VariableVersion holds one pointer");
  const void* address = nullptr;
  std::memcpy(&address, &counter, sizeof(address));
  return address;
}

// Inference tensors do not count theirs.
uint32_t version_of(const c10::VariableVersion& counter) { return counter.enabled() ? counter.current_version() : 0; }

// Where a tensor's elements begin, as a number to compare: not for reading.
const void* data_of(const c10::TensorImpl& tensor, const c10::StorageImpl& storage) {
  const auto offset = tensor.storage_offset() * int64_t(tensor.dtype().itemsize());
  return static_cast<const char*>(storage.data()) + offset;
}

// Whether sizes and strides are numbers that a look can read.
bool has_plain_form(const c10::TensorImpl& tensor) {
  return tensor.has_storage() && !tensor.is_python_dispatch() && !tensor.has_symbolic_sizes_strides() &&
         !tensor.key_set().has(c10::DispatchKey::NestedTensor) && tensor.dim() <= 2;
}

// A number that no dictionary had before, and that it changes with every change; 0 if this Python has none.
uint64_t changes_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
  return 0;
#endif
}

// The same of a class and its bases together. 0 also after a change, until something is looked up in the class.
uint64_t changes_of(PyTypeObject* type) {
#if PY_VERSION_HEX < 0x030C0000
  return PyType_HasFeature(type, Py_TPFLAGS_VALID_VERSION_TAG) ? type->tp_version_tag : 0;
#else
  return 0;
#endif
}

}  // namespace

bool Watch::Seen::is(PyObject* dict) const { return changes_ != 0 && changes_of(dict) == changes_; }
void Watch::Seen::set(PyObject* dict) { changes_ = changes_of(dict); }

bool Watch::Class::is_as_it_was() {
  auto* const own = reinterpret_cast<PyTypeObject*>(type.ptr());
  if (changes != 0 && changes_of(own) == changes) return true;
  if (_PyType_Lookup(own, names().forward) != forward.ptr() || _PyType_Lookup(own, names().call) != call.ptr())
    return false;
  changes = changes_of(own);
  return true;
}

Watch::Value::Value(py::object name, PyObject* object) : name(std::move(name)) {
  if (!object || object == Py_None) {
    nothing = object;
    return;
  }
  type = py::type::of(py::handle(object));
  if (!THPVariable_Check(object)) return;
  const c10::TensorImpl& impl = *THPVariable_Unpack(object).unsafeGetTensorImpl();
  plain = has_plain_form(impl);
  if (!plain) return;
  c10::StorageImpl* const own = impl.unsafe_storage().unsafeGetStorageImpl();
  storage.emplace(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(own));
  counter = impl.version_counter();
  version = version_of(counter);
  data = data_of(impl, *own);
  keys = impl.key_set();
  dtype = impl.dtype();
  dims = size_t(impl.dim());
  std::copy_n(impl.sizes().begin(), dims, sizes.begin());
  std::copy_n(impl.strides().begin(), dims, strides.begin());
}

// What could not be compared when it was recorded is another one each time: whoever reads it refuses it.
bool Watch::Value::is(PyObject* object) const {
  if (!type) return object == nothing;
  if (!plain || !object || Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(type.ptr())) return false;
  const c10::TensorImpl& impl = *THPVariable_Unpack(object).unsafeGetTensorImpl();
  const c10::VariableVersion& own = impl.version_counter();
  if (address_of(own) != address_of(counter) || version_of(own) != version) return false;
  if (!(impl.key_set() == keys) || impl.dtype() != dtype || size_t(impl.dim()) != dims) return false;
  const c10::StorageImpl* const memory = impl.unsafe_storage().unsafeGetStorageImpl();
  return storage->_unsafe_get_target() == memory && data_of(impl, *memory) == data &&
         std::equal(sizes.begin(), sizes.begin() + dims, impl.sizes().begin()) &&
         std::equal(strides.begin(), strides.begin() + dims, impl.strides().begin());
}

bool Watch::Values::are_as_they_were() {
  if (all.empty()) return true;
  if (!dict || !PyDict_Check(dict)) return false;
  if (!seen.is(dict)) {
    for (Value& value : all) value.object = item(dict, value.name.ptr());
    seen.set(dict);
  }
  return std::all_of(all.begin(), all.end(), [](const Value& value) { return value.is(value.object); });
}

size_t Watch::class_of(PyObject* module) {
  PyTypeObject* const type = Py_TYPE(module);
  const auto known = std::find_if(classes_.begin(), classes_.end(), [&](const Class& candidate) {
    return candidate.type.ptr() == reinterpret_cast<PyObject*>(type);
  });
  if (known == classes_.end()) {
    const auto method = [&](PyObject* name) { return py::reinterpret_borrow<py::object>(_PyType_Lookup(type, name)); };
    classes_.push_back({py::type::of(py::handle(module)), method(names().forward), method(names().call)});
    return classes_.size() - 1;
  }
  return size_t(known - classes_.begin());
}

void Watch::Module::record(PyObject* module) {
  reference = weak(module);
  const py::object own = attributes_of(module);
  must_be_called = fastmlp::must_be_called(own.ptr());
  if (PyObject* const replaced = item(own.ptr(), names().forward)) own_forward = weak(replaced);
  for (Attribute& attribute : attributes) {
    attribute.value = py::reinterpret_borrow<py::object>(item(own.ptr(), attribute.name.ptr()));
  }
}

// And finds the dictionaries that they hold.
bool Watch::Module::has_attributes_as_they_were(PyObject* own) {
  if (!seen.is(own)) {
    if (own_forward && item(own, names().forward) != target_of(own_forward)) return false;
    for (const Attribute& attribute : attributes) {
      if (item(own, attribute.name.ptr()) != attribute.value.ptr()) return false;
    }
    if (fastmlp::must_be_called(own) != must_be_called) return false;
    hooks = hooks_of(own);
    modules = children_of(own);
    parameters.dict = item(own, names().parameters);
    buffers.dict = item(own, names().buffers);
    seen.set(own);
  }
  return must_be_called || !any_filled(hooks);
}

Watch::Watch(const py::list& modules) {
  for (const py::handle given : modules) {
    const auto tuple = py::reinterpret_borrow<py::tuple>(given);
    Module module;
    module.parent = tuple[0].cast<size_t>();
    module.name = interned(tuple[1]);
    module.children = tuple[3].cast<Py_ssize_t>();
    for (const py::handle name : tuple[4]) module.attributes.push_back({interned(name), {}});
    for (const py::handle name : tuple[5]) module.parameters.all.emplace_back(interned(name), nullptr);
    for (const py::handle name : tuple[6]) module.buffers.all.emplace_back(interned(name), nullptr);
    const py::object object = tuple[2];
    module.kind = class_of(object.ptr());
    module.record(object.ptr());
    if (!modules_.empty()) modules_.at(module.parent).is_parent = true;
    modules_.push_back(std::move(module));
  }
}

bool Watch::holds_children_as_they_were(size_t parent) {
  Module& m = modules_[parent];
  if (!m.is_parent && m.children < 0) return true;
  if (!m.modules) return false;
  if (m.seen_modules.is(m.modules)) return true;
  if (m.children >= 0 && PyDict_Size(m.modules) != m.children) return false;
  for (size_t i = parent + 1; i < modules_.size(); i++) {
    const Module& child = modules_[i];
    PyObject* const object = target_of(child.reference);
    if (child.parent == parent && (!object || item(m.modules, child.name.ptr()) != object)) return false;
  }
  m.seen_modules.set(m.modules);
  return true;
}

Watch::Finding Watch::look() { return look(true); }

Watch::Finding Watch::look(bool values) {
  if (is_watched() || !std::all_of(classes_.begin(), classes_.end(), [](Class& c) { return c.is_as_it_was(); }))
    return Finding::other_modules;
  for (size_t i = 0; i < modules_.size(); i++) {
    Module& m = modules_[i];
    // Those that hold a module are looked at before, so that all but the model itself are there.
    PyObject* const module = target_of(m.reference);
    if (!module) return Finding::gone;
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != classes_[m.kind].type.ptr()) return Finding::other_modules;
    const py::object own = attributes_of(module);
    if (!m.has_attributes_as_they_were(own.ptr()) || !holds_children_as_they_were(i)) return Finding::other_modules;
    if (values && (!m.parameters.are_as_they_were() || !m.buffers.are_as_they_were())) return Finding::other_values;
  }
  return Finding::unchanged;
}

py::object Watch::read() {
  // Nothing that Python's collector could interrupt is made before all has been seen.
  if (look(false) != Finding::unchanged) return py::none();
  std::vector<std::vector<Value>> recorded;
  std::vector<py::object> objects;
  const auto record = [&](Values& values) {
    std::vector<Value>& all = recorded.emplace_back();
    const bool there = values.dict && PyDict_Check(values.dict);
    for (const Value& value : values.all) {
      PyObject* const object = there ? item(values.dict, value.name.ptr()) : nullptr;
      all.emplace_back(value.name, object);
      objects.push_back(py::reinterpret_borrow<py::object>(object));
    }
    values.seen = Seen();
  };
  for (Module& m : modules_) {
    record(m.parameters);
    record(m.buffers);
  }
  py::list all;
  auto object = objects.begin();
  for (size_t i = 0; i < modules_.size(); i++) {
    modules_[i].parameters.all.swap(recorded[2 * i]);
    modules_[i].buffers.all.swap(recorded[2 * i + 1]);
    py::dict found;
    for (const Values* values : {&modules_[i].parameters, &modules_[i].buffers}) {
      for (const Value& value : values->all) {
        if (const py::object& own = *object++; own) found[value.name] = own;
      }
    }
    all.append(found);
  }
  return all;
}

}  // namespace fastmlp

// The form of a call's arguments and results: see Form in capture.h. Called by capture_replay.cpp at each call, some
// tens of nanoseconds an argument.
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>

#include "capture.h"
#include "objects.h"

namespace fastmlp {
namespace {

bool is_named_tuple(PyObject* object) { return PyTuple_Check(object) && PyObject_HasAttrString(object, "_fields"); }

// What operators of torch return that have several results.
bool is_structure(PyObject* object) {
  return PyTuple_Check(object) && PyObject_HasAttrString(object, "n_sequence_fields");
}

// Values that cannot change, which are compared as such.
bool is_plain_value(PyObject* object) {
  return object == Py_None || PyBool_Check(object) || PyLong_CheckExact(object) || PyFloat_CheckExact(object) ||
         PyComplex_CheckExact(object) || PyUnicode_CheckExact(object) || PyBytes_CheckExact(object);
}

// Bits of floats, so that 0.0 is not -0.0 and NaN is itself.
bool same_value(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (Py_TYPE(a) != Py_TYPE(b)) return false;
  if (PyFloat_CheckExact(a)) {
    const double x = PyFloat_AS_DOUBLE(a), y = PyFloat_AS_DOUBLE(b);
    return std::memcmp(&x, &y, sizeof(x)) == 0;
  }
  if (a == Py_None || PyBool_Check(a) || PyComplex_CheckExact(a)) return false;
  const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) throw py::error_already_set();
  return equal == 1;
}

}  // namespace

bool equal_plain_values(PyObject* a, PyObject* b) {
  return a == b || (is_plain_value(a) && is_plain_value(b) && same_value(a, b));
}

Form::Form(PyObject* object, std::vector<at::Tensor>& tensors) : type_(Py_TYPE(object)), object_(object) {
  if (THPVariable_Check(object)) {
    const at::Tensor& tensor = THPVariable_Unpack(object);
    kind_ = Kind::tensor;
    dtype_ = tensor.scalar_type();
    sizes_ = tensor.sizes().vec();
    strides_ = tensor.strides().vec();
    requires_grad_ = tensor.requires_grad();
    parsed_ = tensor.unsafeGetTensorImpl();
    hooks_ = hooks_of_tensor(object);
    for (first_ = 0; first_ < tensors.size() && !tensors[first_].is_same(tensor); first_++) continue;
    tensors.push_back(tensor);
  } else if (is_plain_value(object)) {
    kind_ = Kind::plain;
  } else if (PyTuple_CheckExact(object) || PyList_CheckExact(object) || is_named_tuple(object) ||
             is_structure(object)) {
    kind_ = PyList_CheckExact(object) ? Kind::list : Kind::tuple;
    for (PyObject* child : items_of(object)) children_.emplace_back(child, tensors);
  } else if (PyDict_Check(object)) {
    kind_ = Kind::dict;
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(object, &at, &key, &value);) {
      keys_.push_back(key);
      children_.emplace_back(value, tensors);
    }
  } else {
    kind_ = Kind::object;
  }
}

bool Form::match_tensor(PyObject* object, const std::vector<at::Tensor>& tensors) const {
  const at::Tensor& tensor = THPVariable_Unpack(object);
  if (tensor.scalar_type() != dtype_ || tensor.sizes() != at::IntArrayRef(sizes_) ||
      tensor.strides() != at::IntArrayRef(strides_) || tensor.requires_grad() != requires_grad_)
    return false;
  if (requires_grad_ && hooks_of_tensor(object) != hooks_) return false;
  if (pinned_ && tensor.unsafeGetTensorImpl() != parsed_) return false;
  size_t first = 0;
  while (first < tensors.size() && !tensors[first].is_same(tensor)) first++;
  return first == first_;
}

bool Form::match(PyObject* object, std::vector<at::Tensor>& tensors) const {
  switch (kind_) {
    case Kind::tensor:
      if (Py_TYPE(object) != type_ || !match_tensor(object, tensors)) return false;
      tensors.push_back(THPVariable_Unpack(object));
      return true;
    case Kind::plain:
      return same_value(object, object_);
    case Kind::object:
      return object == object_;
    case Kind::tuple:
    case Kind::list: {
      if (Py_TYPE(object) != type_) return false;
      const auto items = items_of(object);
      if (items.size() != children_.size()) return false;
      for (size_t i = 0; i < items.size(); i++) {
        if (!children_[i].match(items[i], tensors)) return false;
      }
      return true;
    }
    case Kind::dict: {
      if (Py_TYPE(object) != type_ || size_t(PyDict_GET_SIZE(object)) != children_.size()) return false;
      PyObject *key = nullptr, *value = nullptr;
      size_t i = 0;
      for (Py_ssize_t at = 0; PyDict_Next(object, &at, &key, &value); i++) {
        if (!same_value(key, keys_[i]) || !children_[i].match(value, tensors)) return false;
      }
      return true;
    }
  }
  return false;
}

py::object Form::build(const std::vector<at::Tensor>& tensors, size_t& next) const {
  switch (kind_) {
    case Kind::tensor: {
      // The same tensor in two places of a result is one object, as it was.
      const size_t at = first_ < next ? first_ : next;
      next++;
      return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensors[at]));
    }
    case Kind::plain:
    case Kind::object:
      return py::reinterpret_borrow<py::object>(object_);
    case Kind::list: {
      py::list made(children_.size());
      for (size_t i = 0; i < children_.size(); i++) made[i] = children_[i].build(tensors, next);
      return made;
    }
    case Kind::tuple: {
      py::tuple made(children_.size());
      for (size_t i = 0; i < children_.size(); i++) made[i] = children_[i].build(tensors, next);
      if (type_ == &PyTuple_Type) return made;
      const py::handle type(reinterpret_cast<PyObject*>(type_));
      return py::hasattr(type, "_make") ? type.attr("_make")(made) : type(made);
    }
    case Kind::dict: {
      const py::object made = py::handle(reinterpret_cast<PyObject*>(type_))();
      for (size_t i = 0; i < children_.size(); i++) made[py::handle(keys_[i])] = children_[i].build(tensors, next);
      return made;
    }
  }
  return py::none();
}

void Form::objects(py::list& all) const {
  if (kind_ == Kind::object) all.append(py::reinterpret_borrow<py::object>(object_));
  for (const Form& child : children_) child.objects(all);
}

void Form::pin(const std::vector<at::Tensor>& tensors) {
  for (const at::Tensor& tensor : tensors) pinned_ = pinned_ || parsed_ == tensor.unsafeGetTensorImpl();
  for (Form& child : children_) child.pin(tensors);
}

void Form::borrowed(py::list& all) const {
  if (kind_ == Kind::object || kind_ == Kind::plain) all.append(py::reinterpret_borrow<py::object>(object_));
  all.append(py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(type_)));
  for (PyObject* key : keys_) all.append(py::reinterpret_borrow<py::object>(key));
  for (const Form& child : children_) child.borrowed(all);
}

}  // namespace fastmlp

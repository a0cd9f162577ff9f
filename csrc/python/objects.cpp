// The parts of objects.h that may raise an error of Python.
#include "objects.h"

#include <c10/util/SmallVector.h>

#include <algorithm>
#include <functional>

namespace fastmlp {

const Names& names() {
  static const Names all;
  return all;
}

PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* found = PyDict_GetItemWithError(dict, key);
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

py::object attributes_of(PyObject* object) {
  PyObject* attributes = PyObject_GenericGetDict(object, nullptr);
  if (!attributes) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(attributes);
}

std::optional<double> number_of(PyObject* object) {
  if (!object || !(PyFloat_Check(object) || PyLong_Check(object))) return std::nullopt;
  const double value = PyFloat_AsDouble(object);
  if (value != -1 || !PyErr_Occurred()) return value;
  if (!PyErr_ExceptionMatches(PyExc_OverflowError)) throw py::error_already_set();
  PyErr_Clear();
  return std::nullopt;
}

std::optional<int64_t> integer_of(PyObject* object) {
  if (!object || !PyLong_Check(object)) return std::nullopt;
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0 ? std::optional(value) : std::nullopt;
}

bool is_true(PyObject* object) {
  const int truth = PyObject_IsTrue(object);
  if (truth < 0) throw py::error_already_set();
  return truth > 0;
}

bool has_repeats(c10::ArrayRef<PyObject*> objects) {
  c10::SmallVector<PyObject*, 32> sorted(objects.begin(), objects.end());
  std::sort(sorted.begin(), sorted.end(), std::less<>());
  return std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end();
}

}  // namespace fastmlp

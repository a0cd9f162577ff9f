// What a captured function reads besides its arguments: see Surroundings in capture.h. Asked at each replay, some
// nanoseconds an entry.
#include <torch/csrc/autograd/python_variable.h>

#include <array>

#include "capture.h"
#include "objects.h"

namespace fastmlp {

std::array<Py_ssize_t, 2> hooks_of_tensor(PyObject* tensor) {
  const auto count = [](PyObject* dict) { return dict && PyDict_Check(dict) ? PyDict_GET_SIZE(dict) : 0; };
  const THPVariable* const variable = reinterpret_cast<THPVariable*>(tensor);
  return {count(variable->backward_hooks), count(variable->post_accumulate_grad_hooks)};
}

bool Surroundings::Entry::is(PyObject* now) const {
  switch (mode) {
    case ignored:
      return true;
    case same:
      return now == value;
    default:
      return now == value || (now && value && equal_plain_values(now, value));
  }
}

bool Surroundings::Watched::unchanged() const {
  switch (kind) {
    case dict: {
      if (size_t(PyDict_GET_SIZE(holder)) != entries.size()) return false;
      PyObject *key = nullptr, *value = nullptr;
      size_t i = 0;
      for (Py_ssize_t at = 0; PyDict_Next(holder, &at, &key, &value); i++) {
        if (!entries[i].is(value) || (entries[i].key != key && !equal_plain_values(entries[i].key, key))) return false;
      }
      return true;
    }
    case item:
      return entries[0].is(fastmlp::item(holder, key));
    case sequence: {
      const auto items = items_of(holder);
      if (items.size() != entries.size()) return false;
      for (size_t i = 0; i < items.size(); i++) {
        if (!entries[i].is(items[i])) return false;
      }
      return true;
    }
    case size:
      return PyObject_Size(holder) == counts[0];
    case cell:
      return entries[0].is(PyCell_GET(holder));
    case attribute: {
      const py::object value = py::getattr(holder, key, py::handle());
      return entries[0].is(value.ptr());
    }
    case hooks:
      return hooks_of_tensor(holder) == counts;
  }
  return false;
}

void Surroundings::add_dict(const py::dict& dict, const std::vector<int>& modes) {
  Watched watched{Watched::dict, dict.ptr()};
  PyObject *key = nullptr, *value = nullptr;
  size_t i = 0;
  for (Py_ssize_t at = 0; PyDict_Next(dict.ptr(), &at, &key, &value); i++)
    watched.entries.push_back({value, modes.at(i), key});
  all_.push_back(std::move(watched));
}

void Surroundings::add_item(const py::dict& dict, const py::object& key, int mode) {
  all_.push_back({Watched::item, dict.ptr(), key.ptr(), {{item(dict.ptr(), key.ptr()), mode}}});
}

void Surroundings::add_sequence(const py::object& list_or_tuple, const std::vector<int>& modes) {
  Watched watched{Watched::sequence, list_or_tuple.ptr()};
  size_t i = 0;
  for (PyObject* value : items_of(list_or_tuple.ptr())) watched.entries.push_back({value, modes.at(i++)});
  all_.push_back(std::move(watched));
}

void Surroundings::add_size(const py::object& container) {
  all_.push_back({Watched::size, container.ptr(), nullptr, {}, {Py_ssize_t(py::len(container)), 0}});
}

void Surroundings::add_cell(const py::object& cell, int mode) {
  all_.push_back({Watched::cell, cell.ptr(), nullptr, {{PyCell_GET(cell.ptr()), mode}}});
}

void Surroundings::add_attribute(const py::object& owner, const py::str& name, int mode) {
  const py::object value = owner.attr(name);
  all_.push_back({Watched::attribute, owner.ptr(), name.ptr(), {{value.ptr(), mode}}});
}

void Surroundings::add_hooks(const py::object& tensor) {
  all_.push_back({Watched::hooks, tensor.ptr(), nullptr, {}, hooks_of_tensor(tensor.ptr())});
}

int Surroundings::changed() const {
  for (size_t i = 0; i < all_.size(); i++) {
    if (!all_[i].unchanged()) return int(i);
  }
  return -1;
}

}  // namespace fastmlp

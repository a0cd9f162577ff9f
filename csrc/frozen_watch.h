// Notices that the weights of a model changed, or that its modules were replaced, by a look at each at every call: some
// tens of nanoseconds a module. Used by frozen.cpp with the GIL. Holds weak references only, so that what is
// watched lives no longer than its owners want, and no other object can take its address meanwhile.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <optional>
#include <vector>

namespace fastmlp {

class Watch {
 public:
  enum class Finding { unchanged, gone, other_values, other_modules };

  Watch() = default;
  // `modules`: tuples (parent, name, module, children, parameters, buffers). The first one is the model itself; the
  // others follow their parents, which are given by position. `children`: how many the module has, or -1 if they do not
  // matter; `parameters` and `buffers`: names of the tensors that do.
  explicit Watch(const py::list& modules);

  // Compares with what was there when the watch began.
  Finding look();
  // Takes the tensors as they are now.
  void renew();
  bool empty() const { return modules_.empty(); }

 private:
  struct Value {
    py::object name;
    std::optional<c10::weak_intrusive_ptr<c10::TensorImpl>> tensor;  // none for None
    std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> storage;
    const void* data = nullptr;
    uint32_t version = 0;

    Value(py::object name, PyObject* object);
    bool is(PyObject* object) const;
  };
  struct Module {
    size_t parent = 0;
    py::object name;
    py::object reference;  // weak
    Py_ssize_t children = -1;
    bool is_parent = false;
    std::vector<Value> parameters, buffers;
  };

  static bool same(const std::vector<Value>& values, PyObject* attributes, PyObject* kind);

  std::vector<Module> modules_;
  std::vector<PyObject*> children_;  // during a look, the dictionaries of the parents
};

}  // namespace fastmlp

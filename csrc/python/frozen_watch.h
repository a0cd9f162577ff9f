// Notices that a model changed since its frozen network read it, by a look at each of its modules at every call: some
// tens of nanoseconds a module. Used by frozen.cpp and fastmlp/frozen.py with the GIL. It keeps no module and no tensor
// alive, and hinders no operation on them: torch.utils.swap_tensors refuses tensors with weak references.
//
// A tensor is known by its counter of versions, its storage, and its place and form in that. The counter is owned by
// the watch and the storage by a weak reference, so that no other object can take the address of either meanwhile.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <array>
#include <optional>
#include <vector>

#include "modules.h"

namespace fastmlp {

class Watch {
 public:
  enum class Finding { unchanged, gone, other_values, other_modules };

  // `modules`: tuples (parent, name, module, children, attributes, parameters, buffers). The first one is the model
  // itself; the others follow their parents, which are given by position. `children`: how many the module has, or -1
  // if they do not matter. `attributes`, `parameters` and `buffers`: names of what matters; attributes are recorded
  // here, as are classes and hooks, and tensors by read().
  explicit Watch(const py::list& modules);

  // Compares with what was recorded. Runs no code of Python, so that what it sees is of one moment.
  Finding look();
  // Records the tensors as they are now, and returns them: for each module a dictionary by name. None, if the modules
  // are not the recorded ones any more. What it returns is of one moment.
  py::object read();

  py::object plan;  // whatever the reader of the model keeps with the watch

 private:
  // A dictionary as it was when its entries were compared last. Where Python counts the changes of dictionaries, an
  // equal count says that they need not be looked up again.
  class Seen {
   public:
    bool is(PyObject* dict) const;
    void set(PyObject* dict);

   private:
    uint64_t changes_ = 0;
  };
  // A class of modules, and how it computes.
  struct Class {
    py::object type, forward, call;
    uint64_t changes = 0;  // of the class, when its methods were looked up last
    bool is_as_it_was();
  };
  struct Value {
    py::object name;
    PyObject* object = nullptr;   // borrowed, while the dictionary is as it was seen
    PyObject* nothing = nullptr;  // None or null, if that was there in place of a tensor
    bool plain = false;           // a tensor that can be compared
    py::object type;
    std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> storage;
    c10::VariableVersion counter;
    uint32_t version = 0;
    const void* data = nullptr;
    c10::DispatchKeySet keys;
    caffe2::TypeMeta dtype;
    size_t dims = 0;
    std::array<int64_t, 2> sizes{}, strides{};

    Value(py::object name, PyObject* object);
    bool is(PyObject* object) const;
  };
  // The tensors of a module that are in one of its dictionaries.
  struct Values {
    std::vector<Value> all;
    PyObject* dict = nullptr;  // borrowed, while the module's attributes are as they were seen
    Seen seen;

    bool are_as_they_were();
  };
  struct Attribute {
    py::object name, value;  // a null value if there is none
  };
  struct Module {
    size_t parent = 0, kind = 0;  // positions of the module that holds it, and of its class
    py::object name;
    py::object reference;  // weak
    Py_ssize_t children = -1;
    bool is_parent = false;
    bool must_be_called = false;  // something, such as a hook, wants to see the call
    py::object own_forward;       // weak, if it has one
    std::vector<Attribute> attributes;
    Values parameters, buffers;
    // Borrowed, while the attributes are as they were seen.
    Hooks hooks{};
    PyObject* modules = nullptr;
    Seen seen, seen_modules;

    void record(PyObject* module);
    bool has_attributes_as_they_were(PyObject* attributes);
  };

  size_t class_of(PyObject* module);
  bool holds_children_as_they_were(size_t parent);
  Finding look(bool values);

  std::vector<Class> classes_;
  std::vector<Module> modules_;
};

}  // namespace fastmlp

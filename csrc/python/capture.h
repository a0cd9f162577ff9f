// Captured functions as Python sees them: recordings are matched against a call's arguments (capture_form.cpp) and
// against what the function reads besides (capture_surroundings.cpp), and replayed (capture_replay.cpp);
// capture_build.cpp makes tapes. Called by fastmlp/capture.py. Everything here needs the GIL, a stretch of tape aside.
// Objects that are only borrowed here are kept alive by the Python object that owns the recording, where the garbage
// collector sees them.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../capture/tape.h"

namespace fastmlp {

// The form of nested tuples, lists and dictionaries, with what is in them: tensors by shape, dtype and strides, plain
// values by value, all else by identity.
class Form {
 public:
  // Parses an object, and appends its tensors in the order in which match() finds them.
  Form(PyObject* object, std::vector<at::Tensor>& tensors);

  // Whether an object has this form; appends its tensors.
  bool match(PyObject* object, std::vector<at::Tensor>& tensors) const;
  // An object of this form with these tensors, from `next` on. A new reference.
  py::object build(const std::vector<at::Tensor>& tensors, size_t& next) const;
  // Objects that are told apart by identity, for the caller to look at.
  void objects(py::list& all) const;
  // All that is only borrowed, for the caller to keep alive.
  void borrowed(py::list& all) const;
  // Has match() take only the very tensors that this was parsed from, where they are among these, which stay alive.
  void pin(const std::vector<at::Tensor>& tensors);

 private:
  enum class Kind { tensor, plain, object, tuple, list, dict };

  bool match_tensor(PyObject* object, const std::vector<at::Tensor>& tensors) const;

  Kind kind_;
  PyTypeObject* type_ = nullptr;  // of a container or a plain value
  PyObject* object_ = nullptr;    // borrowed: a plain value, or an object
  std::vector<Form> children_;
  std::vector<PyObject*> keys_;  // of a dictionary, borrowed
  // Of a tensor.
  at::ScalarType dtype_ = at::kFloat;
  std::vector<int64_t> sizes_, strides_;
  bool requires_grad_ = false, pinned_ = false;
  const c10::TensorImpl* parsed_ = nullptr;  // may be gone, unless it is pinned
  std::array<Py_ssize_t, 2> hooks_ = {};     // arguments with hooks are not recorded
  size_t first_ = 0;                         // the first tensor of the call that is the same one
};

// Whether two values of Python that cannot change are equal; false for all others, unless they are one object.
bool equal_plain_values(PyObject* a, PyObject* b);

// How many hooks run when the gradient of a tensor is computed, and how many when it has been accumulated.
std::array<Py_ssize_t, 2> hooks_of_tensor(PyObject* tensor);

// What a captured function reads besides its arguments, and what it was when the function was recorded.
class Surroundings {
 public:
  // How an entry is compared.
  enum Mode { ignored = 0, same = 1, equal = 2 };

  // All entries of a dictionary, and that there are no others.
  void add_dict(const py::dict& dict, const std::vector<int>& modes);
  // One entry of a dictionary; missing is a value too.
  void add_item(const py::dict& dict, const py::object& key, int mode);
  void add_sequence(const py::object& list_or_tuple, const std::vector<int>& modes);
  // How many entries a container has, of whatever kind.
  void add_size(const py::object& container);
  void add_cell(const py::object& cell, int mode);
  // An attribute that is in no dictionary, such as one in a slot.
  void add_attribute(const py::object& owner, const py::str& name, int mode);
  // The hooks that autograd runs for a tensor.
  void add_hooks(const py::object& tensor);

  // The number of the first thing added that is not what it was, or -1.
  int changed() const;

 private:
  struct Entry {
    PyObject* value;  // borrowed; null for a missing one
    int mode;
    PyObject* key = nullptr;  // of a dictionary all of whose entries are watched
    bool is(PyObject* now) const;
  };
  struct Watched {
    enum Kind { dict, item, sequence, size, cell, attribute, hooks } kind;
    PyObject* holder;
    PyObject* key = nullptr;
    std::vector<Entry> entries;
    std::array<Py_ssize_t, 2> counts = {};  // of hooks, or of entries
    bool unchanged() const;
  };

  std::vector<Watched> all_;
};

// Modes of torch that change what a function does.
struct TorchModes {
  bool grad, inference, autocast, deterministic;
  at::ScalarType autocast_dtype, dtype;

  static TorchModes now();
  bool operator==(const TorchModes&) const = default;
};

// Everything about a call that decides which recording it is of, but what a watch sees.
struct Signature {
  Form args, kwargs;
  TorchModes modes;

  // Appends the tensors of the call.
  static Signature of(const py::tuple& args, const py::dict& kwargs, std::vector<at::Tensor>& tensors);
  bool match(const TorchModes& now, const py::tuple& args, const py::dict& kwargs,
             std::vector<at::Tensor>& tensors) const;
};

// What runs where a tape stops: an optimizer's step, by our update if `rule` says so.
struct Stop {
  PyObject* optimizer;  // borrowed
  PyObject* step;       // the function `step` of its class, borrowed
  int rule;             // -1: its own step
};

// One recording that can be replayed.
struct Recording {
  Signature signature;
  Form results;  // a tuple with what was returned
  Surroundings watch;
  std::shared_ptr<Tape> tape;
  std::vector<Stop> stops;
  int64_t id = 0;
};

// The recordings of one function.
class Recordings {
 public:
  // The result of a replay; none if no recording is of these arguments.
  std::optional<py::object> replay(const py::tuple& args, const py::dict& kwargs);
  // Its number. Of many, those are dropped that were not replayed for longest; ids() are the numbers of the others.
  int64_t add(std::unique_ptr<Recording> recording);
  std::vector<int64_t> ids() const;
  int64_t replays() const { return replays_; }
  size_t size() const { return all_.size(); }

 private:
  // Waits until no other thread replays a recording of this function, and holds others off.
  class Turn;

  py::object run(Recording& recording);
  void run_stop(const Stop& stop);

  std::vector<std::shared_ptr<Recording>> all_;  // the one that was replayed last comes first
  int64_t replays_ = 0, added_ = 0;
  std::mutex mutex_;
  std::condition_variable free_;
  std::thread::id running_;  // default: none
};

// Adds the classes and functions that fastmlp/capture.py needs.
void add_capture(py::module_& module);
// Adds the nodes to the class of tapes.
void add_capture_nodes(py::module_& module, py::class_<Tape, std::shared_ptr<Tape>>& tape);

}  // namespace fastmlp

// A recorded step: operators of torch with their arguments bound, on tensors whose shapes never change and whose memory
// is planned. csrc/python/capture_build.cpp fills a tape, capture_replay.cpp runs it. Knows nothing of Python: where
// code of Python has to run, the tape stops and its caller goes on. A tape runs on one thread at a time.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "direct.h"
#include "node.h"

namespace fastmlp {

// Whose a piece of memory is.
enum class Owner {
  arena,    // the tape's, shared with other pieces that live at other times
  tape,     // the tape's own, such as that of constants
  grad,     // a gradient's, which the next replay writes again unless somebody else than the leaf holds it
  outside,  // somebody else's, found anew at each replay
  result,   // new at each replay, for the caller to keep
};

// A tensor that the tape does not make. It is found anew at each replay; of another shape, dtype or device it does not
// fit.
struct External {
  int memory = -1;
  int argument = -1;     // the index among the tensors of the call, or -1
  int grad_of = -1;      // the index of the external whose .grad it is, or -1
  at::Tensor held;       // the tensor itself, if it is neither
  bool written = false;  // by the step
  bool counted = false;  // and as a change of its version, which some operators do not do
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> sizes, strides;
  bool requires_grad = false;
  // Whether it has a .grad when the step begins, where the step would be another one otherwise.
  std::optional<bool> starts_with_grad;
};

// A tensor that the caller gets.
struct Result {
  int tensor = -1;    // one of the tape's, or -1: an external itself
  int external = -1;  // that it is, or of whose memory it is a view
  bool requires_grad = false;
  bool inference = false;  // as torch calls what was made under inference_mode
};

class Tape {
 public:
  // What building a tape asks for, in this order: memory, tensors and externals; then steps; then finish().

  int add_memory(Owner owner, int64_t bytes);
  // A tensor of the tape. `offset` is in elements from the beginning of its memory.
  int add_tensor(int memory, at::ScalarType dtype, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset);
  const at::Tensor& tensor(int index) const { return tensors_[size_t(index)].tensor; }
  int add_external(External external);

  // results: for an operator that returns new tensors, the tensors of the tape that they become; -1 for an undefined
  // one. Empty for operators that write where their arguments say.
  void add_call(c10::OperatorHandle operation, torch::jit::Stack arguments, std::vector<int> results,
                std::string place);
  void add_node(std::unique_ptr<Node> node, std::string place);
  // Puts a tensor of the tape, or none (-1), into the .grad of an external.
  void add_grad(int external, int tensor);
  // Raises, with `error`, unless the number in a tensor is still the one that the recording saw.
  void add_check(int tensor, double expected, std::string error);
  // The caller runs something of its own before it goes on.
  void add_stop(std::string place);
  // Plans the arena; lifetimes are first and last steps of each memory.
  void finish(const std::vector<std::pair<int, int>>& lifetimes, std::vector<Result> results);

  // What replaying asks for, in this order: fits(), start(), run() until it says that all is done, results(), end().

  // Says where memory of the outside lies that belongs to no external, from the next start() on.
  void put(int memory, void* data) { point(memory, data); }
  // Whether the externals are as they were. `arguments` are the tensors of the call.
  bool fits(at::TensorList arguments);
  void start();
  // Whether all has run.
  bool is_done() const { return next_ == steps_.size(); }
  // Finds externals again after code of somebody else ran.
  void refresh();
  // Runs to the next stop. False if there is none any more.
  bool run();
  std::vector<at::Tensor> results();
  // Whether a result is a new tensor that required a gradient when it was recorded.
  bool ends_history(size_t result) const { return results_[result].tensor >= 0 && results_[result].requires_grad; }
  void end();

  // One of so many replays measures its steps, which costs two looks at a clock for each. For tests: 1.
  void measure_each(int64_t replays) { measured_each_ = replays; }
  // Of each step the operator or node that it calls, its place in the user's file, and the nanoseconds that it has
  // taken at least, -1 before a replay was measured: others count what the machine did meanwhile. That of a stop is
  // what its caller did.
  std::vector<std::tuple<std::string, std::string, int64_t>> times() const;

  int64_t arena_bytes() const { return arena_bytes_; }
  int64_t own_bytes() const { return own_bytes_; }
  // How many operators and nodes a replay calls, and how many of them without the dispatcher.
  size_t calls() const;
  size_t direct_calls() const;

 private:
  struct Memory {
    Owner owner;
    int64_t bytes;
    c10::Storage storage;
    c10::Storage own = {};               // of a gradient: what callers see
    std::vector<Pointer> pointers = {};  // of nodes
  };
  // A gradient as its leaf has it.
  struct Grad {
    int external, tensor;
    at::Tensor seen;
  };
  struct Member {
    at::Tensor tensor;
    int memory;
  };
  // What an operator returns, and where it goes.
  struct Returned {
    int tensor;
    bool copied;      // its memory belongs to somebody who keeps it
    at::Tensor held;  // what came last
  };
  struct Step {
    enum Kind { call, run_node, grad, check, stop } kind;
    std::unique_ptr<Node> node;
    std::optional<c10::OperatorHandle> operation;
    torch::jit::Stack arguments;
    Direct* direct = nullptr;
    std::vector<Returned> returned;
    int set = -1, external = -1, tensor = -1;  // set: of the gradient that a leaf gets
    double expected = 0;
    int64_t nanoseconds = -1;
    std::string text;  // the place in the user's file, or the error of a check
  };

  const at::Tensor& found(const External& external) const;
  // Whether it is as it was, gradients aside.
  bool fits(const External& external) const;
  void run(Step& step);
  using Clock = std::chrono::steady_clock;
  static void note(Step& step, Clock::time_point begin);
  // The caller goes on after a stop.
  void end_stop();
  void call(Step& step);
  static std::string name_of(const Step& step);
  void take(Returned& returned, const at::Tensor& result, const Step& step);
  // New memory for a gradient, which the tape has written and somebody holds.
  void renew(int memory);
  void renew_held();
  int memory_of(const at::Tensor& tensor) const;
  void point_externals();
  void point(int memory, void* to) const;

  std::vector<Memory> memories_;
  std::vector<Member> tensors_;
  std::unordered_map<const at::TensorImpl*, int> memories_of_;
  std::vector<External> externals_;
  std::vector<Step> steps_;
  std::vector<Result> results_;
  std::vector<Grad> grads_;
  std::vector<int> fresh_;              // memories that are new at each replay
  std::vector<c10::Storage> storages_;  // of the externals of this replay, and of its fresh memories
  std::vector<c10::Storage> outputs_;
  at::Tensor arena_;
  int64_t arena_bytes_ = 0, own_bytes_ = 0;
  std::vector<at::Tensor> arguments_;
  std::vector<size_t> known_;  // of each memory: how often the tape and gradients refer to it, or 0
  torch::jit::Stack stack_;
  size_t next_ = 0;
  int64_t replays_ = 0, measured_each_ = 64;
  bool measured_ = false;
  Step* stopped_ = nullptr;  // where a measured replay has stopped, and since when
  Clock::time_point since_;
};

}  // namespace fastmlp

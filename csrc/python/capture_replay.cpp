// A call of a captured function that has a recording: it is found, checked and replayed. Called by fastmlp/capture.py
// through capture_build.cpp. Gives up the GIL while a stretch of the tape runs.
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <memory>
#include <type_traits>

#include "../tensors/devices.h"
#include "capture.h"
#include "objects.h"
#include "optimizer.h"
#include "route.h"

namespace fastmlp {

TorchModes TorchModes::now() {
  const bool autocast = at::autocast::is_autocast_enabled(host.type());
  return {at::GradMode::is_enabled(),
          c10::InferenceMode::is_enabled(),
          autocast,
          at::globalContext().deterministicAlgorithms(),
          autocast ? at::autocast::get_autocast_dtype(host.type()) : at::kFloat,
          at::typeMetaToScalarType(at::get_default_dtype())};
}

namespace {

// The history of a result that requires a gradient: whoever asks for it gets an error, as gradients of a captured step
// end inside of it.
struct EndOfHistory : torch::autograd::Node {
  torch::autograd::variable_list apply(torch::autograd::variable_list&&) override {
    TORCH_CHECK(false,
                "fastmlp: capture: backward() reached a result of a captured function, and a replay keeps no graph; "
                "call backward() inside of the function, or capture more of the program");
  }
};

// Torch holds nodes by a shared pointer up to 2.12, and by its own kind of pointer since.
template <class Pointer, class Node> Pointer new_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<typename Pointer::element_type>>) {
    return std::make_shared<Node>();
  } else {
    return c10::make_intrusive<Node>();
  }
}

}  // namespace

Signature Signature::of(const py::tuple& args, const py::dict& kwargs, std::vector<at::Tensor>& tensors) {
  Form form_of_args(args.ptr(), tensors);
  return {std::move(form_of_args), Form(kwargs.ptr(), tensors), TorchModes::now()};
}

bool Signature::match(const TorchModes& now, const py::tuple& given, const py::dict& given_by_name,
                      std::vector<at::Tensor>& tensors) const {
  tensors.clear();
  return modes == now && args.match(given.ptr(), tensors) && kwargs.match(given_by_name.ptr(), tensors);
}

class Recordings::Turn {
 public:
  explicit Turn(Recordings& all) : all_(all) {
    const auto me = std::this_thread::get_id(), none = std::thread::id();
    {
      const std::lock_guard lock(all.mutex_);
      TORCH_CHECK(all.running_ != me,
                  "fastmlp: capture: a captured function was called by itself while it is replayed");
      if (all.running_ == none) {
        all.running_ = me;
        return;
      }
    }
    // The other thread needs the GIL to come to its end.
    const py::gil_scoped_release released;
    std::unique_lock lock(all.mutex_);
    all.free_.wait(lock, [&] { return all.running_ == none; });
    all.running_ = me;
  }
  ~Turn() {
    const std::lock_guard lock(all_.mutex_);
    all_.running_ = std::thread::id();
    all_.free_.notify_one();
  }

 private:
  Recordings& all_;
};

int64_t Recordings::add(std::unique_ptr<Recording> recording) {
  constexpr size_t kept = 32;
  // What a dropped recording borrows may end with it.
  const Turn turn(*this);
  recording->id = ++added_;
  all_.insert(all_.begin(), std::shared_ptr<Recording>(std::move(recording)));
  if (all_.size() > kept) all_.pop_back();
  return added_;
}

std::vector<int64_t> Recordings::ids() const {
  std::vector<int64_t> ids;
  for (const auto& recording : all_) ids.push_back(recording->id);
  return ids;
}

std::optional<py::object> Recordings::replay(const py::tuple& args, const py::dict& kwargs) {
  // A recorder has to see what the function does, and other modes cannot.
  if (all_.empty() || !no_mode_is_active()) return std::nullopt;
  const Turn turn(*this);
  const TorchModes modes = TorchModes::now();
  std::vector<at::Tensor> tensors;
  for (size_t i = 0; i < all_.size(); i++) {
    const std::shared_ptr<Recording> recording = all_[i];
    if (!recording->signature.match(modes, args, kwargs, tensors) || recording->watch.changed() >= 0 ||
        !recording->tape->fits(tensors))
      continue;
    if (i > 0) std::rotate(all_.begin(), all_.begin() + std::ptrdiff_t(i), all_.begin() + std::ptrdiff_t(i) + 1);
    return run(*recording);
  }
  return std::nullopt;
}

void Recordings::run_stop(const Stop& stop) {
  const py::handle optimizer = stop.optimizer;
  if (stop.rule >= 0 && steps_itself(optimizer, stop.step)) {
    OptimizerStep step(optimizer, stop.rule, [](PyObject* parameter) { return THPVariable_Unpack(parameter).grad(); });
    if (step.left().empty() && !step.repeats()) {
      tell_scheduler(optimizer);
      return step.apply();
    }
  }
  optimizer.attr("step")();
}

py::object Recordings::run(Recording& recording) {
  Tape& tape = *recording.tape;
  struct End {
    Tape& tape;
    ~End() { tape.end(); }
  } const end{tape};
  tape.start();
  for (const Stop& stop : recording.stops) {
    {
      const py::gil_scoped_release released;
      tape.run();
    }
    run_stop(stop);
    if (!tape.is_done()) tape.refresh();
  }
  if (!tape.is_done()) {
    const py::gil_scoped_release released;
    tape.run();
  }
  replays_++;
  std::vector<at::Tensor> results = tape.results();
  for (size_t i = 0; i < results.size(); i++) {
    using Pointer = decltype(torch::autograd::Edge::function);
    if (tape.ends_history(i)) torch::autograd::create_gradient_edge(results[i], new_node<Pointer, EndOfHistory>());
  }
  size_t next = 0;
  return recording.results.build(results, next)[py::int_(0)];
}

}  // namespace fastmlp

// When and how a call gives up the GIL. Used by every file of this folder that calls a kernel, so that the threshold
// and the way stand in one place.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include "../tensors/borrowed.h"

namespace fastmlp {

// Multiply-adds that take some microseconds. Below that, giving up the GIL and taking it again costs more than other
// threads of Python gain.
constexpr double worth_releasing = 1 << 16;

// About how many multiply-adds the forward pass of a network with these parameters takes.
inline double multiply_adds(at::TensorList parameters, const at::Tensor& input) {
  double weights = 0;
  for (const at::Tensor& parameter : parameters) weights += double(parameter.numel());
  const int64_t features = input.dim() == 0 ? 0 : input.sizes().back();
  return features == 0 ? 0 : weights * double(input.numel() / features);
}

// The same of elements that are moved: read and written, with little arithmetic.
constexpr int64_t elements_worth_releasing = 1 << 14;

// Gives up the GIL, if `worth` says that the work is worth it, until end() or the end of its life.
class ReleasedGil {
 public:
  // hold(held) is called while the GIL is still there, and takes the tensors that other threads could free meanwhile.
  template <class Hold> ReleasedGil(bool worth, const Hold& hold) {
    if (!worth) return;
    hold(held_);
    thread_ = PyEval_SaveThread();
  }
  // The caller holds the tensors itself.
  explicit ReleasedGil(bool worth) : ReleasedGil(worth, [](Held&) {}) {}
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;
  ~ReleasedGil() { end(); }

  // Takes the GIL again. The tensors are held on.
  void end() {
    if (thread_) PyEval_RestoreThread(thread_);
    thread_ = nullptr;
  }

 private:
  Held held_;
  PyThreadState* thread_ = nullptr;
};

}  // namespace fastmlp

// Scratch memory of one pass: one block, from whoever called, cut into pieces. Used by network.cu and narrow.cu.
#pragma once

#include <cstddef>
#include <cstdint>

#include "products.h"

namespace fastmlp::cuda {

// Pieces of one block of memory; made without one, it only adds up what they take.
class Carver {
 public:
  explicit Carver(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  template <class T> T* take(int64_t count) {
    constexpr size_t alignment = 256;
    const size_t at = used_;
    used_ += (size_t(count) * sizeof(T) + alignment - 1) / alignment * alignment;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Runs `pass(carver, false)` to add up its memory, allocates that, and runs `pass(carver, true)`.
template <class Pass> void with_memory(const Context& context, const Pass& pass) {
  Carver measure;
  pass(measure, false);
  Carver carver(measure.used() > 0 ? context.allocate(measure.used()) : nullptr);
  pass(carver, true);
}

// The first layer that a gradient is asked of; as many as there are layers if there is none.
inline size_t lowest_layer(const BackwardPass& pass) {
  size_t lowest = 0;
  if (pass.grad_input) return lowest;
  while (lowest < pass.network.layers.size() && !pass.grad_weights[lowest] && !pass.grad_biases[lowest]) lowest++;
  return lowest;
}

}  // namespace fastmlp::cuda

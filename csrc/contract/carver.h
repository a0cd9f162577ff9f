// Cuts one block of scratch memory into aligned pieces. Each device's workspace.h names its alignment and says where
// the block comes from. Used by baseline code; allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmlp {

// Hands out aligned pieces of a block, or, made without one, only adds up what they would take.
template <size_t alignment> class CarverOf {
 public:
  explicit CarverOf(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  // Null without a block. The contents are not initialised.
  template <class T> T* take(int64_t count) {
    const size_t at = used_;
    used_ += (size_t(count) * sizeof(T) + alignment - 1) / alignment * alignment;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace fastmlp

// A list of tensors that somebody else keeps alive, without counting references: a count that goes from one to two and
// back takes the GIL, for the object that wraps the tensor in Python, and a network has many tensors. Used by
// csrc/python for tensors that come from Python. Whoever gives up the GIL meanwhile must hold them first (Held).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/MaybeOwned.h>
#include <c10/util/SmallVector.h>

#include <vector>

namespace fastmlp {

class Borrowed {
 public:
  Borrowed() = default;
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  ~Borrowed() { clear(); }

  void push_back(const at::Tensor& tensor) { tensors_.push_back(Traits::createBorrow(tensor)); }
  void clear() { shrink(0); }
  // Drops all but the first `size`.
  void shrink(size_t size) {
    for (size_t i = size; i < tensors_.size(); i++) Traits::destroyBorrow(tensors_[i]);
    tensors_.resize(size);
  }
  size_t size() const { return tensors_.size(); }
  const at::Tensor& operator[](size_t i) const { return tensors_[i]; }
  operator at::TensorList() const { return tensors_; }

 private:
  using Traits = c10::MaybeOwnedTraits<at::Tensor>;
  c10::SmallVector<at::Tensor, 16> tensors_;
};

// Tensors that must live, and their memory too, while the GIL is given up: another thread may put other memory into a
// tensor (tensor.data = ...), or another tensor in its place.
class Held {
 public:
  void take(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    tensors_.push_back(tensor);
    storages_.push_back(tensor.storage());
  }
  void take(at::TensorList tensors) {
    for (const at::Tensor& tensor : tensors) take(tensor);
  }

 private:
  std::vector<at::Tensor> tensors_;
  std::vector<c10::Storage> storages_;
};

}  // namespace fastmlp

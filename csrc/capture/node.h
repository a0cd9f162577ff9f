// A step of a tape that no operator of torch computes: several operations of the recorded function at once, by kernels
// of ours. Made in csrc/python/capture_nodes.cpp, run by tape.cpp. The memory of its tensors may be another one at each
// replay: the tape writes into the node where each lies, so that a run has nothing to look up.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "checks.h"

namespace fastmlp {

// A pointer of a node to the first element of a tensor.
struct Pointer {
  at::Tensor tensor;
  void** place;

  int64_t offset() const { return tensor.storage_offset() * int64_t(tensor.itemsize()); }
  void point(void* memory) const { *place = static_cast<char*>(memory) + offset(); }
};

class Node {
 public:
  Node() = default;
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;
  virtual ~Node() = default;

  // Runs in the thread that replays, without the GIL.
  virtual void run() = 0;
  // For reports: "elementwise".
  virtual const char* name() const = 0;

  const std::vector<Pointer>& pointers() const { return pointers_; }
  // For a node without a tape: its tensors stay where they are.
  void find() const {
    for (const Pointer& pointer : pointers_) {
      pointer.tensor.mutable_data_ptr();  // of its own from here on, if it is a copy that waits for the first write
      pointer.point(pointer.tensor.storage().mutable_data());
    }
  }

 protected:
  // `place` is null until somebody writes it, and stays null without a tensor.
  void keep(const at::Tensor& tensor, void*& place) {
    if (tensor.defined()) pointers_.push_back({tensor, &place});
  }
  void keep(const at::Tensor& tensor, const void*& place) { keep(tensor, const_cast<void*&>(place)); }
  template <class Place> void keep(const std::optional<at::Tensor>& tensor, Place& place) {
    if (tensor) keep(*tensor, place);
  }
  // Keeps a tensor of these sizes without gaps, of the dtype and device of `like`, or raises an error that names it.
  template <class Place>
  void take(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, const at::Tensor& like, Place& place) {
    check_like(tensor, name, sizes, like);
    check_gapless(tensor, name);
    keep(tensor, place);
  }
  template <class Place>
  void take(const std::optional<at::Tensor>& tensor, const char* name, at::IntArrayRef sizes, const at::Tensor& like,
            Place& place) {
    if (tensor) take(*tensor, name, sizes, like, place);
  }

 private:
  std::vector<Pointer> pointers_;
};

// A node that is one call of a device's operation with a pass of csrc/contract/.
template <class Pass, class Result = void> class PassNode : public Node {
 public:
  void run() override { operation_(pass_); }

 protected:
  using Node::keep;
  using Node::take;

  Pass pass_;
  Result (*operation_)(const Pass&) = nullptr;
};

}  // namespace fastmlp

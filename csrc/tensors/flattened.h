// Inputs of a network that begins by flattening all dimensions but the first, as torch.nn.Flatten() does: which shapes
// it takes, and for frozen networks the rows in the memory of the host. Used by python/train_step_read.cpp,
// python/frozen.cpp and capture/frozen_graph.cpp.
#pragma once

#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <memory>

#include "frozen_network.h"

namespace fastmlp {

// Raises if an input of this shape does not become rows of so many features. `whose`: what has these in_features.
void check_flattened(c10::IntArrayRef shape, int64_t features, const char* whose);

// The rows of a flattened input: its own memory where the strides allow that, and a copy where they do not.
class FlatRows {
 public:
  // x: at least two dimensions, the first one of rows, which have so many features each. `element`: bytes of one:
  // 2, 4 or 8.
  FlatRows(const StridedView& x, int64_t features, int64_t element);
  FlatRows(const FlatRows&) = delete;
  FlatRows& operator=(const FlatRows&) = delete;

  const StridedView& view() const { return view_; }

 private:
  StridedView view_;
  std::unique_ptr<char[]> copy_;
};

// The elements of an input one after another, row by row: its own memory where they lie so, and a copy where they do
// not.
class GaplessRows {
 public:
  // `element`: bytes of one: 2, 4 or 8.
  GaplessRows(const StridedView& x, int64_t element);

  const char* data() const { return data_; }

 private:
  const char* data_;
  std::unique_ptr<char[]> copy_;
};

}  // namespace fastmlp

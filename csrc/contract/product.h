// A matrix product by itself, as a node of a tape states it: output = act(a b + bias). Filled by
// capture/product_node.cpp, computed by the device's `multiply`. Knows no torch, and computes nothing.
#pragma once

#include "problem.h"

namespace fastmlp {

struct ProductPass {
  DType dtype = DType::float32;
  int64_t m = 0, n = 0, k = 0;
  Matrix a;     // [m, k]
  Matrix b;     // [k, n]
  Vector bias;  // [n]
  ActivationSpec activation;
  void* output = nullptr;          // [m, n], gapless rows that are row_stride apart
  void* pre_activation = nullptr;  // null, or like output
  int64_t row_stride = 0;
  void* row_sums = nullptr;  // null, or [m]: the sum of each row of a
};

}  // namespace fastmlp

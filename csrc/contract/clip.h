// The torch-free contract of clipping: where gradients lie, and which norm is asked for. Filled by python/clip.cpp and
// executed by cpu/clip.cpp.
#pragma once

#include "problem.h"

namespace fastmlp {

// The elements of a gradient, which lie in memory without gaps, in whatever order.
struct Gradient {
  DType dtype = DType::float32;
  int64_t n = 0;
  void* data = nullptr;
};

enum class NormOrder { two, infinity };

}  // namespace fastmlp

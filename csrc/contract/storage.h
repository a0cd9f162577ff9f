// Dtypes as C++ types: what holds their elements, and what sums of these are kept in. Torch-free, for the kernels and
// the strategy of every device.
#pragma once

#include "problem.h"

namespace fastmlp {

template <class S> struct ComputeOf {
  using Type = S;
};
template <> struct ComputeOf<BFloat16> {
  using Type = float;
};
template <> struct ComputeOf<Float16> {
  using Type = float;
};
template <class S> using Compute = typename ComputeOf<S>::Type;

// Calls f(S{}) for the dtype in memory.
template <class F> auto with_storage(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::float64:
      return f(double{});
    case DType::bfloat16:
      return f(BFloat16{});
    case DType::float16:
      return f(Float16{});
  }
  __builtin_unreachable();
}

}  // namespace fastmlp

// What one product kernel computes: C = A B with strided operands, and what follows it. This is the whole argument of
// the kernels of simt.cuh and mma.cuh. network.cu fills it; NT, NN and TN products differ by their strides only.
#pragma once

#include <cstdint>

#include "../contract/shape.h"
#include "../contract/storage.h"

namespace fastmlp::cuda {

// A (rows of C) or B (columns of C). Strides count elements, any may be zero.
template <class S> struct Operand {
  const S* data = nullptr;
  int64_t stride = 0;    // from one row of A, or column of B, to the next
  int64_t k_stride = 0;  // along the dimension that is summed over
};

template <class S> struct StridedMatrix {
  const S* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;
};

template <class S> StridedMatrix<S> strided(const Matrix& x) {
  return {static_cast<const S*>(x.data), x.row_stride, x.column_stride};
}

// What follows the sums of a tile. Each kernel is compiled for one of these.
//   forward: pre_activation = sums + bias and output = act(sums + bias), either of them if not null
//   dgrad:   output = sums * act'(saved), the layer below's, and the sums of its columns within each row of tiles
//   wgrad:   output = sums, or these of a part of k into `partials`; the same of A's rows alone, if row_sums is not
//   null
enum class Epilogue { forward, dgrad, wgrad };

template <class S> struct Product {
  using C = Compute<S>;
  int64_t m = 0, n = 0, k = 0;
  Operand<S> a, b;
  S* output = nullptr;          // [m, n] without gaps
  S* pre_activation = nullptr;  // like output
  const S* bias = nullptr;      // [n], or null
  int64_t bias_stride = 0;
  ActivationSpec activation;
  StridedMatrix<S> saved;     // [m, n], null for the identity
  C* column_sums = nullptr;   // [rows of tiles, n], or null
  C* partials = nullptr;      // [parts, m, n], or null
  S* row_sums = nullptr;      // [m], or null
  C* row_partials = nullptr;  // [parts, m], or null
  int64_t part = 0;           // how much of k each part sums: all of it without partials
  bool vectors = false;       // all but the operands can be accessed four elements at a time
};

}  // namespace fastmlp::cuda

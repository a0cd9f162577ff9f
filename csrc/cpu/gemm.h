// The macro-kernel: C = act(A B + bias) for strided A and B, where either may be formed on the fly
// while it is packed. NT, NN and TN are strides. Called by network.cpp for every forward, dgrad and
// wgrad. Owns blocking, packing order, scratch and threads; all arithmetic is behind the table.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "kernel_table.h"

namespace fastmlp::cpu {

// What is packed: the data itself, data * act'(saved), or act(data).
enum class Form { plain, gradient, value };

// A (rows of C) or B (columns of C) of a product. Strides count elements, any may be zero.
template <class S> struct Operand {
  const S* data = nullptr;
  int64_t stride = 0;    // from one row of A, or column of B, to the next
  int64_t k_stride = 0;  // along the dimension that is summed over
  Form form = Form::plain;
  ActivationSpec activation;  // of form gradient or value
  const S* saved = nullptr;   // of form gradient
  int64_t saved_stride = 0;
  int64_t saved_k_stride = 0;
};

template <class S> struct Product {
  int64_t m = 0, n = 0, k = 0;
  Operand<S> a, b;
  S* output = nullptr;          // [m, n], rows leading_dimension apart
  S* pre_activation = nullptr;  // null, or like output
  int64_t leading_dimension = 0;
  Vector bias;  // [n]
  ActivationSpec activation;
  S* row_sums = nullptr;  // null, or [m]: the sums of A's rows over k, while A is packed anyway
  // K may be cut into chunks that are summed in order (the cut depends on the shape alone): for
  // weight gradients, whose K is the batch. Needs neither bias nor activation.
  bool split_k = false;
};

// The result has the same bits for any number of threads.
template <class S> void multiply(const KernelTable& table, const Product<S>& product, int threads);

// How many of `threads` are worth waking for that many multiply-adds.
int useful_threads(double multiply_adds, int threads);

}  // namespace fastmlp::cpu

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

template <class S> Operand<S> operand(const Matrix& x, int64_t stride, int64_t k_stride) {
  Operand<S> operand;
  operand.data = static_cast<const S*>(x.data);
  operand.stride = stride;
  operand.k_stride = k_stride;
  return operand;
}
template <class S> Operand<S> rows_of(const Matrix& x) { return operand<S>(x, x.row_stride, x.column_stride); }
template <class S> Operand<S> columns_of(const Matrix& x) { return operand<S>(x, x.column_stride, x.row_stride); }

// output = act(input weight^T + bias) for `rows` rows.
template <class S>
Product<S> forward_product(const Layer& layer, int64_t rows, const Matrix& input, S* output, S* pre_activation) {
  Product<S> p;
  p.m = rows;
  p.n = layer.out_features;
  p.k = layer.in_features;
  p.a = rows_of<S>(input);
  p.b = rows_of<S>(layer.weight);
  p.output = output;
  p.pre_activation = pre_activation;
  p.leading_dimension = layer.out_features;
  p.bias = layer.bias;
  p.activation = layer.activation;
  return p;
}

// Whether multiply computes inner products of what lies in memory, and packs nothing.
template <class S> bool goes_by_dots(const KernelTable& table, const Product<S>& product);

// The result has the same bits for any number of threads.
template <class S> void multiply(const KernelTable& table, const Product<S>& product, int threads);

}  // namespace fastmlp::cpu

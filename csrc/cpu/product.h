// A matrix product as the CPU device states it: C = act(A B + bias), where A and B are strided, so that NT, NN and TN
// are only strides. Filled by network.cpp and row_forward.h, computed by gemm.cpp and dots.h. Computes nothing.
#pragma once

#include <cstdint>

#include "../contract/problem.h"
#include "kernel_table.h"

namespace fastmlp::cpu {

// What enters the product: the data itself, data * act'(saved), or act(data). The latter two are computed while the
// operand is packed, and are never stored.
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
  S* row_sums = nullptr;  // null, or [m]: the sum of each row of A, taken while A is packed anyway
  // Whether K may be cut into chunks whose sums are added in order. For weight gradients, whose K is the batch; such a
  // product has neither bias nor activation.
  bool split_k = false;
};

// Fills in output = act(input weight^T + bias) for `rows` rows.
template <class S>
void set_forward(Product<S>& p, const Layer& layer, int64_t rows, const Matrix& input, S* output, S* pre_activation) {
  p.m = rows;
  p.n = layer.out_features;
  p.k = layer.in_features;
  p.a.data = static_cast<const S*>(input.data);
  p.a.stride = input.row_stride;
  p.a.k_stride = input.column_stride;
  p.b.data = static_cast<const S*>(layer.weight.data);
  p.b.stride = layer.weight.row_stride;
  p.b.k_stride = layer.weight.column_stride;
  p.output = output;
  p.pre_activation = pre_activation;
  p.leading_dimension = layer.out_features;
  p.bias = layer.bias;
  p.activation = layer.activation;
}

}  // namespace fastmlp::cpu

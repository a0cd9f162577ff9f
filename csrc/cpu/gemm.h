// The macro-kernel: C = act(A B + bias) for strided A and B, where either may be formed on the fly
// while it is packed. NT, NN and TN are strides. Called by network.cpp for forward, dgrad and wgrad of wide
// layers. Owns blocking, packing order, scratch and threads; all arithmetic is behind the table.
#pragma once

#include <cstdint>

#include "../contract/problem.h"
#include "kernel_table.h"
#include "parallel.h"

namespace fastmlp::cpu {

// Sums of so few terms cost less than packing B, and less than writing the result: it is written in long runs.
constexpr int64_t streamed_depth = 8;

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

// output = act(input weight^T + bias) for `rows` rows.
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

// Whether multiply would compute a plain product as inner products of what lies in memory, and pack nothing; by its
// shape, and by whether A and B are gapless along k.
template <class S>
bool goes_by_dots(const Kernels<S>& kernels, int64_t m, int64_t n, int64_t k, bool a_gapless, bool b_gapless);

// That for rows m and columns n of the result alone, by the calling thread. `a` and `b` begin at the first of these
// and are gapless along k. `tile` holds a register tile, `bias` so many values.
template <class S> int64_t dot_bias_size(const Kernels<S>& kernels);
template <class S>
void multiply_by_dots(const Kernels<S>& kernels, const Product<S>& product, Range m, Range n, const Operand<S>& a,
                      const Operand<S>& b, Compute<S>* tile, Compute<S>* bias);

// The result has the same bits for any number of threads.
template <class S> void multiply(const KernelTable& table, const Product<S>& product, int threads);

}  // namespace fastmlp::cpu

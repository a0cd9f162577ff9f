// Passes over a matrix without a product: the derivative of a last layer with its bias gradient, outputs from kept
// pre-activations, and the second stage of ordered sums. Launched by network.cu and products.cuh.
#pragma once

#include "arithmetic.cuh"
#include "fused.h"

namespace fastmlp::cuda {

template <class S> struct ElementwiseOperand {
  const S* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;
};

// gradient: output = grad * act'(saved), and the sums of its columns within each run of rows.
// value: output = act(saved).
enum class Elementwise { gradient, value };

template <class S> struct ElementwiseArguments {
  int64_t rows = 0, columns = 0;
  int64_t run = 0;                    // rows of one block
  ElementwiseOperand<S> grad, saved;  // [rows, columns]; saved is not read for the identity
  ActivationSpec activation;
  S* output = nullptr;                // [rows, columns] without gaps, or null
  Compute<S>* column_sums = nullptr;  // [runs, columns], or null
};

constexpr int pass_threads = 256;

// Sums over threadIdx.y, in order, for each threadIdx.x; only threads with y 0 get them.
template <class C> __device__ C sum_over_y(C value) {
  auto& sums = shared<C[pass_threads]>();
  sums[threadIdx.y * blockDim.x + threadIdx.x] = value;
  __syncthreads();
  if (threadIdx.y > 0) return 0;
  C sum = 0;
  for (unsigned y = 0; y < blockDim.y; y++) sum += sums[y * blockDim.x + threadIdx.x];
  return sum;
}

// A block takes blockDim.x columns and a run of rows, each thread every blockDim.y-th row of one column.
template <class S, Elementwise what>
__global__ void __launch_bounds__(pass_threads, 4) elementwise(const ElementwiseArguments<S> p) {
  using C = Compute<S>;
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t begin = blockIdx.y * p.run;
  const int64_t end = column >= p.columns ? begin : begin + p.run < p.rows ? begin + p.run : p.rows;
  C sum = 0;
  with_activation(p.activation.kind, Activations{}, [&](auto activation) {
    using A = decltype(activation);
    for (int64_t row = begin + threadIdx.y; row < end; row += blockDim.y) {
      C saved = 0;
      if (p.saved.data) saved = widen(p.saved.data[row * p.saved.row_stride + column * p.saved.column_stride]);
      C result;
      if constexpr (what == Elementwise::gradient) {
        const C grad = widen(p.grad.data[row * p.grad.row_stride + column * p.grad.column_stride]);
        result = A::template gradient<ScalarMath<C>>(grad, saved, p.activation.scalars);
        sum += result;
      } else {
        result = A::template value<ScalarMath<C>>(saved, p.activation.scalars);
      }
      if (p.output) p.output[row * p.columns + column] = Narrow<S>::from(result);
    }
  });
  if (what == Elementwise::gradient && p.column_sums) {
    sum = sum_over_y(sum);
    if (threadIdx.y == 0 && column < p.columns) p.column_sums[blockIdx.y * p.columns + column] = sum;
  }
}

// output[i] = the sum over `count` rows of partials[., i].
template <class S>
__global__ void __launch_bounds__(pass_threads)
    sum_rows(const Compute<S>* partials, int64_t count, int64_t columns, S* output) {
  using C = Compute<S>;
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  C sum = 0;
  if (column < columns) {
    for (int64_t row = threadIdx.y; row < count; row += blockDim.y) sum += partials[row * columns + column];
  }
  sum = sum_over_y(sum);
  if (threadIdx.y == 0 && column < columns) output[column] = Narrow<S>::from(sum);
}

// The same of all sums of a fused backward, in one launch.
template <class S> __global__ void __launch_bounds__(pass_threads) sum_fused(const FusedSums<S> p) {
  using C = Compute<S>;
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  C sum = 0;
  if (column < p.stride) {
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < p.count; row += blockDim.y) sum += p.partials[row * p.stride + column];
  }
  sum = sum_over_y(sum);
  if (threadIdx.y > 0) return;
#pragma unroll 1
  for (int i = 0; i < p.segments; i++) {
    const auto& segment = p.segment[i];
    if (column >= segment.begin && column < segment.end) segment.output[column - segment.begin] = Narrow<S>::from(sum);
  }
}

}  // namespace fastmlp::cuda

// Passes over a matrix without a product: the derivative of a last layer with its bias gradient, outputs from kept
// pre-activations, and the second stage of sums whose order is fixed. They are bound by memory. Launched by
// products.cuh.
#pragma once

#include "arithmetic.cuh"
#include "fused.h"

namespace fastmlp::cuda {

// gradient: output = grad * act'(saved), and the sums of its columns within each run of rows.
// value: output = act(saved).
enum class Elementwise { gradient, value };

template <class S> struct ElementwiseArguments {
  int64_t rows = 0, columns = 0;
  int64_t run = 0;               // rows of one block
  StridedMatrix<S> grad, saved;  // [rows, columns]; saved is not read for the identity
  ActivationSpec activation;
  S* output = nullptr;                // [rows, columns] without gaps, or null
  Compute<S>* column_sums = nullptr;  // [runs, columns], aligned to 16 bytes, or null
};

constexpr int pass_threads = 256;
constexpr int sum_threads = 1024;  // of the second stage, which has few columns and many rows

// Adds up `sums` over threadIdx.y, always in the same order; the threads with y 0 get the results. blockDim.y is a
// power of two.
template <class C, int threads, int vector> __device__ void sum_over_y(C (&sums)[vector]) {
  // Threads beside each other write 16 bytes beside each other, so that they use different banks.
  constexpr int part = vector < per_16_bytes<C> ? vector : per_16_bytes<C>, parts = vector / part;
  auto& rows = shared<Vec<C, part>[parts][threads]>();
  const unsigned own = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int e = 0; e < vector; e++) rows[e / part][own].element[e % part] = sums[e];
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y >= half) continue;
    const unsigned other = own + half * blockDim.x;
#pragma unroll
    for (int e = 0; e < vector; e++) rows[e / part][own].element[e % part] += rows[e / part][other].element[e % part];
  }
#pragma unroll
  for (int e = 0; e < vector; e++) sums[e] = rows[e / part][own].element[e % part];
}

template <class S, int vector>
__device__ __forceinline__ void load_vector(Compute<S> (&to)[vector], const StridedMatrix<S>& from, int64_t row,
                                            int64_t column) {
  // One element may lie anywhere; several lie side by side.
  const S* const place = from.data + row * from.row_stride + (vector > 1 ? column : column * from.column_stride);
  const auto read = *reinterpret_cast<const Vec<S, vector>*>(place);
#pragma unroll
  for (int e = 0; e < vector; e++) to[e] = widen(read.element[e]);
}

// A block takes blockDim.x vectors of columns and a run of rows, each thread every blockDim.y-th row of one vector.
template <class S, Elementwise what, int vector>
__global__ void __launch_bounds__(pass_threads, 4) elementwise(const ElementwiseArguments<S> p) {
  using C = Compute<S>;
  const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * vector;
  const int64_t begin = blockIdx.y * p.run;
  const int64_t end = column >= p.columns ? begin : begin + p.run < p.rows ? begin + p.run : p.rows;
  C sums[vector] = {};
  with_activation(p.activation.kind, Activations{}, [&](auto activation) {
    using A = decltype(activation);
    for (int64_t row = begin + threadIdx.y; row < end; row += blockDim.y) {
      C saved[vector] = {}, results[vector];
      if (p.saved.data) load_vector<S, vector>(saved, p.saved, row, column);
      if constexpr (what == Elementwise::gradient) {
        C grads[vector];
        load_vector<S, vector>(grads, p.grad, row, column);
#pragma unroll
        for (int e = 0; e < vector; e++) {
          results[e] = A::template gradient<ScalarMath<C>>(grads[e], saved[e], p.activation.scalars);
          sums[e] += results[e];
        }
      } else {
#pragma unroll
        for (int e = 0; e < vector; e++) results[e] = A::template value<ScalarMath<C>>(saved[e], p.activation.scalars);
      }
      if (!p.output) continue;
      Vec<S, vector> written;
#pragma unroll
      for (int e = 0; e < vector; e++) written.element[e] = Narrow<S>::from(results[e]);
      *reinterpret_cast<Vec<S, vector>*>(p.output + row * p.columns + column) = written;
    }
  });
  if (what == Elementwise::gradient && p.column_sums) {
    sum_over_y<C, pass_threads>(sums);
    if (threadIdx.y == 0 && column < p.columns) {
      Vec<C, vector> written;
#pragma unroll
      for (int e = 0; e < vector; e++) written.element[e] = sums[e];
      *reinterpret_cast<Vec<C, vector>*>(p.column_sums + blockIdx.y * p.columns + column) = written;
    }
  }
}

// Returns the sum of a column of `partials` over `count` rows, to the threads with y 0. All threads of a block call it.
template <int threads, class C>
__device__ __forceinline__ C sum_column(const C* partials, int64_t count, int64_t columns, int64_t column) {
  C sum[1] = {};
  if (column < columns) {
    // Unrolled, so that several reads are under way at once.
#pragma unroll 8
    for (int64_t row = threadIdx.y; row < count; row += blockDim.y) sum[0] += partials[row * columns + column];
  }
  if (blockDim.y > 1) sum_over_y<C, threads>(sum);
  return sum[0];
}

// output[i] = the sum over `count` rows of partials[., i].
template <class S>
__global__ void __launch_bounds__(sum_threads)
    sum_rows(const Compute<S>* partials, int64_t count, int64_t columns, S* output) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const Compute<S> sum = sum_column<sum_threads>(partials, count, columns, column);
  if (threadIdx.y == 0 && column < columns) output[column] = Narrow<S>::from(sum);
}

// Does the same for all gradients of a backward in one launch: their sums lie side by side in segments.
template <class S> __global__ void __launch_bounds__(pass_threads) sum_fused(const FusedSums<S> p) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const Compute<S> sum = sum_column<pass_threads>(p.partials, p.count, p.stride, column);
  if (threadIdx.y > 0) return;
#pragma unroll 1
  for (int i = 0; i < p.segments; i++) {
    const auto& segment = p.segment[i];
    if (column >= segment.begin && column < segment.end) segment.output[column - segment.begin] = Narrow<S>::from(sum);
  }
}

}  // namespace fastmlp::cuda

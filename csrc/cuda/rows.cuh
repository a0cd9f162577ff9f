// Passes over a matrix without a product: the derivative of a last layer with its bias gradient, outputs from kept
// pre-activations, and the second stage of ordered sums. Bound by memory. Launched by products.cuh.
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
  Compute<S>* column_sums = nullptr;  // [runs, columns], aligned to 16 bytes, or null
};

constexpr int pass_threads = 256;
constexpr int sum_threads = 1024;  // of the second stage, which has few columns and many rows

// Sums over threadIdx.y, always in the same order, which the threads with y 0 get. blockDim.y is a power of two.
template <class C, int threads, int vector> __device__ void sum_over_y(C (&sums)[vector]) {
  // Threads beside each other have 16 bytes beside each other.
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
__device__ __forceinline__ void load_vector(Compute<S> (&to)[vector], const ElementwiseOperand<S>& from, int64_t row,
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

// output[i] = the sum over `count` rows of partials[., i].
template <class S>
__global__ void __launch_bounds__(sum_threads)
    sum_rows(const Compute<S>* partials, int64_t count, int64_t columns, S* output) {
  using C = Compute<S>;
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  C sum[1] = {};
  if (column < columns) {
    // Several reads are under way at once.
#pragma unroll 8
    for (int64_t row = threadIdx.y; row < count; row += blockDim.y) sum[0] += partials[row * columns + column];
  }
  if (blockDim.y > 1) sum_over_y<C, sum_threads>(sum);
  if (threadIdx.y == 0 && column < columns) output[column] = Narrow<S>::from(sum[0]);
}

// The same of all sums of a fused backward, in one launch.
template <class S> __global__ void __launch_bounds__(pass_threads) sum_fused(const FusedSums<S> p) {
  using C = Compute<S>;
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  C sum[1] = {};
  if (column < p.stride) {
#pragma unroll 8
    for (int64_t row = threadIdx.y; row < p.count; row += blockDim.y) sum[0] += p.partials[row * p.stride + column];
  }
  if (blockDim.y > 1) sum_over_y<C, pass_threads>(sum);
  if (threadIdx.y > 0) return;
#pragma unroll 1
  for (int i = 0; i < p.segments; i++) {
    const auto& segment = p.segment[i];
    if (column >= segment.begin && column < segment.end)
      segment.output[column - segment.begin] = Narrow<S>::from(sum[0]);
  }
}

}  // namespace fastmlp::cuda

// Narrow networks, depth-fused: a block takes rows through all layers, and what lies between layers never leaves shared
// memory. It lies there transposed, one line for each feature, so that products read four rows at once. Weights come
// by eight terms of k at a time. Lines past a layer's features, up to a multiple of eight, hold zeros.
#pragma once

#include "fused.h"
#include "simt.cuh"

namespace fastmlp::cuda {

template <class C, int rows> using Features = C[fused_width][rows + 4];

template <class Tile, class C> struct FusedShared {
  Features<C, Tile::BM> features;
  C weights[2][Tile::BK][fused_width + 4];
};

constexpr int fused_threads = 256;

// f(row, feature) for all rows of a block and features from 0 to `count`, neighbouring threads on neighbouring
// features.
template <class F> __device__ __forceinline__ void each_feature(int rows, int count, const F& f) {
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * count; i += fused_threads) f(i / count, i % count);
}

__device__ __forceinline__ int whole_lines(int features) { return (features + 7) / 8 * 8; }

// to[feature][row] = value(row, feature) where row and feature exist, else 0.
template <int rows, class C, class F>
__device__ __forceinline__ void fill(Features<C, rows>& to, int rows_left, int features, const F& value) {
  each_feature(rows, whole_lines(features), [&](int row, int feature) {
    to[feature][row] = row < rows_left && feature < features ? value(row, feature) : C(0);
  });
}

// sums += a b for the rows in shared memory; b is [depth, columns]. Waits first for whoever wrote a, and at the end
// until all have read it.
template <class Tile, class S, class C>
__device__ __forceinline__ void multiply_narrow(C (&sums)[Tile::TM][Tile::TN], const Features<C, Tile::BM>& a,
                                                C (&weights)[2][Tile::BK][fused_width + 4], const Operand<S>& b,
                                                int columns, int depth) {
  constexpr int BK = Tile::BK, TM = Tile::TM, TN = Tile::TN;
  constexpr int group_rows = Tile::BM / (TM / 4), group_columns = Tile::BN / (TN / 4);
  const int tx = threadIdx.x % (Tile::BN / TN) * 4, ty = threadIdx.x / (Tile::BN / TN) * 4;
  Loader<S, Tile, fused_width, Read::elements> loader(b, 0, columns, 0);
  loader.load(depth);
  loader.store(weights[0]);
  __syncthreads();
  int stage = 0;
#pragma unroll 1
  for (int k = 0; k < depth; k += BK) {
    loader.load(depth - k - BK);
#pragma unroll
    for (int kk = 0; kk < BK; kk++) {
      C rows[TM], line[TN];
#pragma unroll
      for (int i = 0; i < TM; i += 4) load_group(rows + i, &a[k + kk][i / 4 * group_rows + ty]);
#pragma unroll
      for (int j = 0; j < TN; j += 4) load_group(line + j, &weights[stage][kk][j / 4 * group_columns + tx]);
#pragma unroll
      for (int i = 0; i < TM; i++) {
#pragma unroll
        for (int j = 0; j < TN; j++) sums[i][j] += rows[i] * line[j];
      }
    }
    stage ^= 1;
    loader.store(weights[stage]);
    __syncthreads();
  }
}

// The sums of a layer in place of its input. Lines past `features` and rows past `rows` become zero: a product of zero
// with infinity may have made them NaN.
template <class Tile, class C>
__device__ __forceinline__ void keep_sums(Features<C, Tile::BM>& to, const C (&sums)[Tile::TM][Tile::TN], int features,
                                          int rows) {
  constexpr int group_rows = Tile::BM / (Tile::TM / 4), group_columns = Tile::BN / (Tile::TN / 4);
  const int tx = threadIdx.x % (Tile::BN / Tile::TN) * 4, ty = threadIdx.x / (Tile::BN / Tile::TN) * 4;
#pragma unroll
  for (int j = 0; j < Tile::TN; j++) {
    const int feature = j / 4 * group_columns + tx + j % 4;
#pragma unroll
    for (int i = 0; i < Tile::TM; i += 4) {
      Vec<C, 4> group;
#pragma unroll
      for (int e = 0; e < 4; e++)
        group.element[e] = feature < features && i / 4 * group_rows + ty + e < rows ? sums[i + e][j] : C(0);
      *reinterpret_cast<Vec<C, 4>*>(&to[feature][i / 4 * group_rows + ty]) = group;
    }
  }
}

template <class S> __device__ __forceinline__ Compute<S> element(const StridedMatrix<S>& x, int64_t row, int column) {
  return widen(x.data[row * x.row_stride + column * x.column_stride]);
}

using FusedForwardTile = SimtTile<fused_forward_rows, fused_width, 8, 4, 8>;

template <class S> __global__ void __launch_bounds__(fused_threads, 2) fused_forward(const FusedNetwork<S> p) {
  using C = Compute<S>;
  using Tile = FusedForwardTile;
  static_assert(Tile::threads == fused_threads);
  auto& memory = shared<FusedShared<Tile, C>>();
  const int64_t first = int64_t(blockIdx.x) * Tile::BM;
  const int rows = rows_inside(first, p.rows, Tile::BM);
  fill<Tile::BM>(memory.features, rows, p.layer[0].in_features,
                 [&](int row, int feature) { return element(p.input, first + row, feature); });
#pragma unroll 1
  for (int l = 0; l < p.layers; l++) {
    const FusedLayer<S>& layer = p.layer[l];
    C sums[Tile::TM][Tile::TN] = {};
    multiply_narrow<Tile>(sums, memory.features, memory.weights,
                          Operand<S>{layer.weight.data, layer.weight.row_stride, layer.weight.column_stride},
                          layer.out_features, layer.in_features);
    keep_sums<Tile>(memory.features, sums, layer.out_features, rows);
    __syncthreads();
    with_activation(layer.activation.kind, Activations{}, [&](auto activation) {
      using A = decltype(activation);
      each_feature(rows, layer.out_features, [&](int row, int feature) {
        C& place = memory.features[feature][row];
        const int64_t at = (first + row) * layer.out_features + feature;
        const C z = layer.bias ? place + widen(layer.bias[feature * layer.bias_stride]) : place;
        if (layer.pre_activation) layer.pre_activation[at] = Narrow<S>::from(z);
        place = A::template value<ScalarMath<C>>(z, layer.activation.scalars);
        if (layer.output) layer.output[at] = Narrow<S>::from(place);
      });
    });
  }
}

using FusedBackwardTile = SimtTile<fused_backward_rows, fused_width, 8, 4, 4>;

// What backward has besides: the input of the layer that it is at.
template <class C> struct FusedBackwardShared {
  FusedShared<FusedBackwardTile, C> grad;
  Features<C, fused_backward_rows> input;
};

// weight_sums (+)= grad^T input over the rows in shared memory. A thread has 8 x 8 elements, 16 apart.
template <class C, int rows>
__device__ __forceinline__ void add_weight_sums(C* weight_sums, bool add, const Features<C, rows>& grad,
                                                const Features<C, rows>& input, int out_features, int in_features) {
  const int out = threadIdx.x / 16, in = threadIdx.x % 16;
  C sums[8][8] = {};
#pragma unroll 1
  for (int r = 0; r < rows; r += 4) {
    C grads[8][4];
#pragma unroll
    for (int i = 0; i < 8; i++) load_group(grads[i], &grad[out + i * 16][r]);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      C inputs[4];
      load_group(inputs, &input[in + j * 16][r]);
#pragma unroll
      for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) sums[i][j] += grads[i][e] * inputs[e];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int o = out + i * 16, k = in + j * 16;
      if (o >= out_features || k >= in_features) continue;
      C& place = weight_sums[o * in_features + k];
      place = add ? place + sums[i][j] : sums[i][j];
    }
  }
}

// A block takes every gridDim.x-th run of rows and adds up its own sums of weights and biases.
template <class S> __global__ void __launch_bounds__(fused_threads, 2) fused_backward(const FusedNetwork<S> p) {
  using C = Compute<S>;
  using Tile = FusedBackwardTile;
  static_assert(Tile::threads == fused_threads);
  auto& memory = shared<FusedBackwardShared<C>>();
  Features<C, Tile::BM>& grad = memory.grad.features;
  const int64_t block = int64_t(blockIdx.x) * p.sums_stride;
  // grad *= act'(saved), of layer l
  const auto differentiate = [&](int l, int64_t first, int rows) {
    const FusedLayer<S>& layer = p.layer[l];
    with_activation(layer.activation.kind, Activations{}, [&](auto activation) {
      using A = decltype(activation);
      if constexpr (!std::is_same_v<A, Identity>) {
        each_feature(rows, layer.out_features, [&](int row, int feature) {
          C& place = grad[feature][row];
          place = A::template gradient<ScalarMath<C>>(place, element(layer.saved, first + row, feature),
                                                      layer.activation.scalars);
        });
      }
    });
  };
  const auto load_input = [&](int l, int64_t first, int rows) {
    const int features = p.layer[l].in_features;
    if (l == 0) {
      fill<Tile::BM>(memory.input, rows, features,
                     [&](int row, int feature) { return element(p.input, first + row, feature); });
      return;
    }
    const FusedLayer<S>& below = p.layer[l - 1];
    if (below.keeps_output) {
      fill<Tile::BM>(memory.input, rows, features,
                     [&](int row, int feature) { return element(below.saved, first + row, feature); });
      return;
    }
    with_activation(below.activation.kind, Activations{}, [&](auto activation) {
      using A = decltype(activation);
      fill<Tile::BM>(memory.input, rows, features, [&](int row, int feature) {
        return A::template value<ScalarMath<C>>(element(below.saved, first + row, feature), below.activation.scalars);
      });
    });
  };

#pragma unroll 1
  for (int64_t first = int64_t(blockIdx.x) * Tile::BM; first < p.rows; first += int64_t(gridDim.x) * Tile::BM) {
    const int rows = rows_inside(first, p.rows, Tile::BM);
    const bool add = first >= int64_t(gridDim.x) * Tile::BM;
    fill<Tile::BM>(grad, rows, p.layer[p.layers - 1].out_features,
                   [&](int row, int feature) { return element(p.grad, first + row, feature); });
    __syncthreads();
    differentiate(p.layers - 1, first, rows);
#pragma unroll 1
    for (int l = p.layers - 1; l >= p.lowest; l--) {
      const FusedLayer<S>& layer = p.layer[l];
      const int out = layer.out_features, in = layer.in_features;
      if (layer.weight_sums) load_input(l, first, rows);
      __syncthreads();
      if (layer.weight_sums) add_weight_sums<C, Tile::BM>(layer.weight_sums + block, add, grad, memory.input, out, in);
      if (layer.bias_sums && int(threadIdx.x) < out) {
        C sum = 0;
        for (int row = 0; row < rows; row++) sum += grad[threadIdx.x][row];
        C& place = layer.bias_sums[block + threadIdx.x];
        place = add ? place + sum : sum;
      }
      if (l == p.lowest && !p.grad_input) break;
      C sums[Tile::TM][Tile::TN] = {};
      multiply_narrow<Tile>(sums, grad, memory.grad.weights,
                            Operand<S>{layer.weight.data, layer.weight.column_stride, layer.weight.row_stride}, in,
                            out);
      keep_sums<Tile>(grad, sums, in, rows);
      __syncthreads();
      if (l > 0) {
        differentiate(l - 1, first, rows);
      } else {
        each_feature(rows, in, [&](int row, int feature) {
          p.grad_input[(first + row) * in + feature] = Narrow<S>::from(grad[feature][row]);
        });
      }
    }
    __syncthreads();
  }
}

}  // namespace fastmlp::cuda

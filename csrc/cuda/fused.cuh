// Narrow float32 networks, all layers in one launch: a block takes rows through all layers, and what lies between
// layers never leaves shared memory. It lies there transposed, one line for each feature, so that products read four
// rows at once. Weights are loaded eight terms of k at a time. Launched by products.cuh, with the tile that fits the
// widest layer.
#pragma once

#include "fused.h"
#include "simt.cuh"

namespace fastmlp::cuda {

constexpr int fused_threads = 128;
// Blocks of a multiprocessor that the registers are made for; its shared memory may hold fewer.
template <int TM> constexpr int fused_forward_blocks = TM == 8 ? 3 : 4;
template <int width> constexpr int fused_backward_blocks = width > 64 ? 3 : 4;

// The tile for layers of up to `width` features: BM rows go through them together, and each thread has TM x 8 sums.
template <int width, int TM> using FusedTile = SimtTile<fused_threads * TM * 8 / width, width, 8, TM, 8>;

// Lines of BM rows, one for each feature. Groups of four rows are permuted by the number of the feature's quad, so that
// threads on eight neighbouring quads of features use different banks, and so do threads on different rows and quads.
// Up to 32 features, the number's bits are rotated, because eight threads then have four quads of features and two of
// rows; its parity stays the same, which add_bias_sums relies on.
template <class C, int width, int BM> struct Features {
  alignas(16) C elements[width * BM];

  static __device__ __forceinline__ int place(int feature, int row) {
    const int turn = feature / 4 % 8 * 4;
    return feature * BM + (row ^ (width > 32 ? turn : (turn * 2 % 32 + turn / 16 * 4) ^ turn % 8));
  }
  __device__ __forceinline__ C& at(int feature, int row) { return elements[place(feature, row)]; }
  __device__ __forceinline__ C at(int feature, int row) const { return elements[place(feature, row)]; }
  // Four rows.
  __device__ __forceinline__ void load(C* to, int feature, int row) const {
    load_group(to, elements + place(feature, row));
  }
  __device__ __forceinline__ void store(int feature, int row, const C (&from)[4]) {
    Vec<C, 4> group;
#pragma unroll
    for (int e = 0; e < 4; e++) group.element[e] = from[e];
    *reinterpret_cast<Vec<C, 4>*>(elements + place(feature, row)) = group;
  }
};

// Two tiles of a layer's weights: one is multiplied while the next one is loaded.
template <class C, class Tile> using FusedWeights = C[2][Tile::BK][Tile::BN + 4];

// The shared memory of a block of backward: the gradient and the input of its rows, and weights.
template <class C, int width>
constexpr size_t fused_backward_shared =
    sizeof(Features<C, width, FusedTile<width, 4>::BM>[2]) + sizeof(FusedWeights<C, FusedTile<width, 4>>);

// Calls f(row, feature) for all rows of a block and every fourth feature below `features`. A warp takes eight quads of
// features in four rows, so that it reads and writes memory in runs of 128 bytes.
template <int BM, class F> __device__ __forceinline__ void each_quad(int features, const F& f) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int feature = lane % 8 * 4; feature < features; feature += 32) {
#pragma unroll 1
    for (int row = lane / 8 + warp * 4; row < BM; row += fused_threads / 8) f(row, feature);
  }
}

__device__ __forceinline__ int whole_lines(int features) { return (features + 7) / 8 * 8; }

__device__ __forceinline__ int valid_of_quad(int feature, int features) {
  return features - feature < 4 ? features - feature : 4;
}

// Whether quads of a matrix without gaps can be accessed at once.
template <class S> __device__ __forceinline__ bool has_vectors(const S* x, int features) {
  return has_vectors<4>(StridedMatrix<S>{x, features, 1});
}

// Loads a quad of a matrix in memory, of which `valid` features exist; the others become zero.
template <class S>
__device__ __forceinline__ void load_quad(Compute<S> (&to)[4], const StridedMatrix<S>& x, bool vectors, int64_t row,
                                          int feature, int valid) {
  load_run(to, x.data + row * x.row_stride + feature * x.column_stride, x.column_stride, valid, vectors && valid == 4);
}

// to = x, after value(quad) has changed each quad of it. Rows and features that do not exist become zero, up to the end
// of whole lines.
template <class C, int width, int BM, class S, class F>
__device__ __forceinline__ void fill(Features<C, width, BM>& to, const StridedMatrix<S>& x, int64_t first, int rows,
                                     int features, const F& value) {
  const bool vectors = has_vectors<4>(x);
  each_quad<BM>(whole_lines(features), [&](int row, int feature) {
    const int valid = row < rows ? valid_of_quad(feature, features) : 0;
    C quad[4] = {};
    if (valid > 0) {
      load_quad(quad, x, vectors, first + row, feature, valid);
      value(quad);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) to.at(feature + e, row) = e < valid ? quad[e] : C(0);
  });
}

// The sums of all rows begin with the biases of their features.
template <class Tile, class S, class C>
__device__ __forceinline__ void begin_with_bias(C (&sums)[Tile::TM][Tile::TN], const FusedLayer<S>& layer) {
  const ThreadPlace<Tile, C> place(threadIdx.x);
  const bool vectors = layer.bias_stride == 1 && has_vectors(layer.bias, layer.out_features);
#pragma unroll
  for (int j = 0; j < Tile::TN; j += 4) {
    const int feature = place.column(j);
    const int valid = valid_of_quad(feature, layer.out_features);
    C bias[4] = {};
    if (layer.bias && valid > 0)
      load_run(bias, layer.bias + feature * layer.bias_stride, layer.bias_stride, valid, vectors);
#pragma unroll
    for (int i = 0; i < Tile::TM; i++) {
#pragma unroll
      for (int e = 0; e < 4; e++) sums[i][j + e] = bias[e];
    }
  }
}

// sums += a b for the rows in shared memory, where b is [depth, columns]. It begins and ends with a barrier, so a may
// have been written just before, and may be overwritten after it.
template <class Tile, class S, class C>
__device__ __forceinline__ void multiply_narrow(C (&sums)[Tile::TM][Tile::TN], const Features<C, Tile::BN, Tile::BM>& a,
                                                FusedWeights<C, Tile>& weights, const Operand<S>& b, int columns,
                                                int depth) {
  constexpr int BK = Tile::BK, TM = Tile::TM, TN = Tile::TN;
  const ThreadPlace<Tile, C> place(threadIdx.x);
  Loader<S, Tile, Tile::BN, Read::elements> loader(b, 0, columns, 0, depth);
  loader.load();
  loader.store(weights[0]);
  __syncthreads();
  int stage = 0;
#pragma unroll 1
  for (int k = 0; k < depth; k += BK) {
    loader.load();
#pragma unroll
    for (int kk = 0; kk < BK; kk++) {
      C rows[TM], line[TN];
#pragma unroll
      for (int i = 0; i < TM; i += 4) a.load(rows + i, k + kk, place.row(i));
#pragma unroll
      for (int j = 0; j < TN; j += 4) load_group(line + j, &weights[stage][kk][place.column(j)]);
      add_outer_product(sums, rows, line);
    }
    stage ^= 1;
    loader.store(weights[stage]);
    __syncthreads();
  }
}

// Writes the sums of a layer where its input was. Lines past `features` and rows past `rows` become zero, because a
// product of zero with infinity may have made them NaN.
template <class Tile, class C>
__device__ __forceinline__ void keep_sums(Features<C, Tile::BN, Tile::BM>& to, const C (&sums)[Tile::TM][Tile::TN],
                                          int features, int rows) {
  const ThreadPlace<Tile, C> place(threadIdx.x);
#pragma unroll
  for (int j = 0; j < Tile::TN; j++) {
    const int feature = place.column(j);
#pragma unroll
    for (int i = 0; i < Tile::TM; i += 4) {
      const int row = place.row(i);
      C group[4];
#pragma unroll
      for (int e = 0; e < 4; e++) group[e] = feature < features && row + e < rows ? sums[i + e][j] : C(0);
      to.store(feature, row, group);
    }
  }
}

template <class S, int width, int TM>
__global__ void __launch_bounds__(fused_threads, fused_forward_blocks<TM>) fused_forward(const FusedNetwork<S> p) {
  using C = Compute<S>;
  using Tile = FusedTile<width, TM>;
  constexpr int BM = Tile::BM;
  static_assert(Tile::threads == fused_threads);
  auto& features = shared<Features<C, width, BM>>();
  auto& weights = shared<FusedWeights<C, Tile>>();
  const int64_t first = int64_t(blockIdx.x) * BM;
  const int rows = rows_inside(first, p.rows, BM);
  fill(features, p.input, first, rows, p.layer[0].in_features, [](C(&)[4]) {});
#pragma unroll 1
  for (int l = 0; l < p.layers; l++) {
    const FusedLayer<S>& layer = p.layer[l];
    const int out = layer.out_features;
    C sums[Tile::TM][Tile::TN];
    begin_with_bias<Tile>(sums, layer);
    multiply_narrow<Tile>(sums, features, weights,
                          Operand<S>{layer.weight.data, layer.weight.row_stride, layer.weight.column_stride}, out,
                          layer.in_features);
    keep_sums<Tile>(features, sums, out, rows);
    __syncthreads();
    with_activation(layer.activation.kind, Activations{}, [&](auto activation) {
      using A = decltype(activation);
      const bool vectors = has_vectors(layer.output, out) && has_vectors(layer.pre_activation, out);
      each_quad<BM>(out, [&](int row, int feature) {
        const int valid = valid_of_quad(feature, out);
        const bool writes = row < rows;
        const int64_t at = (first + row) * out + feature;
        C quad[4];
#pragma unroll
        for (int e = 0; e < 4; e++) quad[e] = features.at(feature + e, row);
        if (layer.pre_activation && writes) store_run(layer.pre_activation + at, quad, valid, vectors);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          quad[e] = A::template value<ScalarMath<C>>(quad[e], layer.activation.scalars);
          if (e < valid) features.at(feature + e, row) = quad[e];
        }
        if (layer.output && writes) store_run(layer.output + at, quad, valid, vectors);
      });
    });
  }
}

// A thread's part of a layer's weight gradient, TO x TI elements at a time: TO outputs in succession, and quads of
// inputs that lie `columns` quads apart.
template <int width> struct WeightTile {
  static constexpr int columns = width / 4 < 16 ? width / 4 : 16;  // threads
  static constexpr int lines = fused_threads / columns;
  static constexpr int TI = width / columns, TO = width / lines < 8 ? width / lines : 8;
  static constexpr int passes = width / (lines * TO);
};

// weight_sums (+)= grad^T input over the rows in shared memory.
template <class C, int width, int BM>
__device__ __forceinline__ void add_weight_sums(C* weight_sums, bool add, const Features<C, width, BM>& grad,
                                                const Features<C, width, BM>& input, int out_features,
                                                int in_features) {
  using Tile = WeightTile<width>;
  constexpr int TO = Tile::TO, TI = Tile::TI;
  const bool vectors = has_vectors(weight_sums, in_features);
  const int in = threadIdx.x % Tile::columns * 4;
#pragma unroll 1
  for (int pass = 0; pass < Tile::passes; pass++) {
    const int out = (pass * Tile::lines + threadIdx.x / Tile::columns) * TO;
    if (out >= out_features || in >= in_features) continue;
    C sums[TO][TI] = {};
#pragma unroll 1
    for (int r = 0; r < BM; r += 4) {
      C grads[TO][4];
#pragma unroll
      for (int i = 0; i < TO; i++) grad.load(grads[i], out + i, r);
#pragma unroll
      for (int j = 0; j < TI; j++) {
        C inputs[4];
        input.load(inputs, in + j / 4 * Tile::columns * 4 + j % 4, r);
#pragma unroll
        for (int i = 0; i < TO; i++) {
#pragma unroll
          for (int e = 0; e < 4; e++) sums[i][j] += grads[i][e] * inputs[e];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < TO; i++) {
#pragma unroll
      for (int j = 0; j < TI; j += 4) {
        const int o = out + i, k = in + j / 4 * Tile::columns * 4;
        if (o >= out_features || k >= in_features) continue;
        C* const place = weight_sums + o * in_features + k;
        const int valid = valid_of_quad(k, in_features);
        C quad[4] = {};
        if (add) load_run(quad, place, 1, valid, vectors);
#pragma unroll
        for (int e = 0; e < 4; e++) quad[e] += sums[i][j + e];
        store_run(place, quad, valid, vectors);
      }
    }
  }
}

// bias_sums (+)= the sums of grad over the rows in shared memory.
template <class C, int width, int BM>
__device__ __forceinline__ void add_bias_sums(C* bias_sums, bool add, const Features<C, width, BM>& grad,
                                              int out_features) {
  static_assert(BM % 32 == 0);
  const int out = int(threadIdx.x);
  if (out >= out_features) return;
  C sum = 0;
#pragma unroll 4
  for (int r = 0; r < BM; r += 4) {
    C grads[4];
    // Features of a quad begin at different rows, because their lines lie in the same banks.
    grad.load(grads, out, r ^ out % 4 * 8);
    sum += (grads[0] + grads[1]) + (grads[2] + grads[3]);
  }
  bias_sums[out] = add ? bias_sums[out] + sum : sum;
}

// grad *= act'(saved), for a layer's outputs and the block's rows, from row `first` of the batch on.
template <class C, int width, int BM, class S>
__device__ __forceinline__ void differentiate(Features<C, width, BM>& grad, const FusedLayer<S>& layer, int64_t first,
                                              int rows) {
  const bool vectors = has_vectors<4>(layer.saved);
  with_activation(layer.activation.kind, Activations{}, [&](auto activation) {
    using A = decltype(activation);
    if constexpr (!std::is_same_v<A, Identity>) {
      each_quad<BM>(layer.out_features, [&](int row, int feature) {
        if (row >= rows) return;
        const int valid = valid_of_quad(feature, layer.out_features);
        C saved[4];
        load_quad(saved, layer.saved, vectors, first + row, feature, valid);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          C& place = grad.at(feature + e, row);
          if (e < valid) place = A::template gradient<ScalarMath<C>>(place, saved[e], layer.activation.scalars);
        }
      });
    }
  });
}

// to = the input of layer l: the network's, or what the layer below saved, with its activation where that is missing.
template <class C, int width, int BM, class S>
__device__ __forceinline__ void load_input(Features<C, width, BM>& to, const FusedNetwork<S>& p, int l, int64_t first,
                                           int rows) {
  const int features = p.layer[l].in_features;
  if (l == 0) return fill(to, p.input, first, rows, features, [](C(&)[4]) {});
  const FusedLayer<S>& below = p.layer[l - 1];
  if (below.keeps_output) return fill(to, below.saved, first, rows, features, [](C(&)[4]) {});
  with_activation(below.activation.kind, Activations{}, [&](auto activation) {
    using A = decltype(activation);
    fill(to, below.saved, first, rows, features, [&](C(&quad)[4]) {
#pragma unroll
      for (int e = 0; e < 4; e++) quad[e] = A::template value<ScalarMath<C>>(quad[e], below.activation.scalars);
    });
  });
}

// A block takes every gridDim.x-th run of rows and adds up its own sums of weights and biases.
template <class S, int width>
__global__ void __launch_bounds__(fused_threads, fused_backward_blocks<width>) fused_backward(const FusedNetwork<S> p) {
  using C = Compute<S>;
  using Tile = FusedTile<width, 4>;
  constexpr int BM = Tile::BM;
  static_assert(Tile::threads == fused_threads && width <= fused_threads);
  auto& tiles = shared<Features<C, width, BM>[2]>();
  auto& weights = shared<FusedWeights<C, Tile>>();
  Features<C, width, BM>&grad = tiles[0], &input = tiles[1];
  const int64_t block = int64_t(blockIdx.x) * p.sums_stride;

#pragma unroll 1
  for (int64_t first = int64_t(blockIdx.x) * BM; first < p.rows; first += int64_t(gridDim.x) * BM) {
    const int rows = rows_inside(first, p.rows, BM);
    const bool add = first >= int64_t(gridDim.x) * BM;
    fill(grad, p.grad, first, rows, p.layer[p.layers - 1].out_features, [](C(&)[4]) {});
    __syncthreads();
    differentiate(grad, p.layer[p.layers - 1], first, rows);
#pragma unroll 1
    for (int l = p.layers - 1; l >= p.lowest; l--) {
      const FusedLayer<S>& layer = p.layer[l];
      const int out = layer.out_features, in = layer.in_features;
      if (layer.weight_sums) load_input(input, p, l, first, rows);
      __syncthreads();
      if (layer.weight_sums) add_weight_sums(layer.weight_sums + block, add, grad, input, out, in);
      if (layer.bias_sums) add_bias_sums(layer.bias_sums + block, add, grad, out);
      if (l == p.lowest && !p.grad_input) break;
      C sums[Tile::TM][Tile::TN] = {};
      multiply_narrow<Tile>(sums, grad, weights,
                            Operand<S>{layer.weight.data, layer.weight.column_stride, layer.weight.row_stride}, in,
                            out);
      keep_sums<Tile>(grad, sums, in, rows);
      __syncthreads();
      if (l > 0) {
        differentiate(grad, p.layer[l - 1], first, rows);
      } else {
        const bool vectors = has_vectors(p.grad_input, in);
        each_quad<BM>(in, [&](int row, int feature) {
          if (row >= rows) return;
          C quad[4];
#pragma unroll
          for (int e = 0; e < 4; e++) quad[e] = grad.at(feature + e, row);
          store_run(p.grad_input + (first + row) * in + feature, quad, valid_of_quad(feature, in), vectors);
        });
      }
    }
    __syncthreads();
  }
}

}  // namespace fastmlp::cuda

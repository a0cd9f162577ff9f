// What the kernels of fused.cuh compute: a whole network of narrow layers, forward or backward, in one launch. Filled
// by narrow.cu from problem.h; their whole argument.
#pragma once

#include <cstdint>

#include "product.h"

namespace fastmlp::cuda {

constexpr int fused_width = 128;       // the widest layer
constexpr int most_fused_layers = 16;  // so many fit into a kernel's argument

// On tensor cores, layers of up to W features: a warp's fragments of 16 rows, a block's threads, and how many blocks of
// a multiprocessor the registers are made for. Backward has `stages` tiles of inputs, the next layer's ahead, and gives
// a warp part_rows x part_columns of the gradient of weights, which registers hold for `held` layers.
template <int W> struct MmaFused;
template <> struct MmaFused<64> {
  static constexpr int forward_fragments = 2, forward_threads = 128, forward_blocks = 4;
  static constexpr int backward_fragments = 2, backward_threads = 128, backward_blocks = 2, stages = 2;
  static constexpr int part_rows = 32, part_columns = 32, held = 3;
};
template <> struct MmaFused<128> {
  static constexpr int forward_fragments = 2, forward_threads = 128, forward_blocks = 2;
  static constexpr int backward_fragments = 1, backward_threads = 256, backward_blocks = 1, stages = 1;
  static constexpr int part_rows = 32, part_columns = 64, held = 1;
};

// Features that a product of fragments takes in place of so many.
constexpr int padded(int features) { return features <= 16 ? 16 : features <= 32 ? 32 : features <= 64 ? 64 : 128; }

constexpr int rows_inside(int64_t first, int64_t rows, int most) {
  return rows - first < most ? int(rows - first) : most;
}

template <class S> struct StridedMatrix {
  const S* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;
};

template <class S> struct FusedLayer {
  using C = Compute<S>;
  int in_features = 0, out_features = 0;
  StridedMatrix<S> weight;
  ActivationSpec activation;
  // forward: what to add and, if not null, to keep
  const S* bias = nullptr;
  int64_t bias_stride = 0;
  S* output = nullptr;
  S* pre_activation = nullptr;
  int place = 0;  // of the weights among those of all layers, on tensor cores
  // backward: what forward kept, and the first block's sums, if not null
  StridedMatrix<S> saved;
  bool keeps_output = false;
  bool differentiates = false;  // is not the identity
  C* weight_sums = nullptr;
  C* bias_sums = nullptr;
  int held = -1;  // on tensor cores: which of the sums that stay in registers are the weights', if any
};

template <class S> struct FusedNetwork {
  int64_t rows = 0;
  int layers = 0;
  StridedMatrix<S> input;
  // backward
  StridedMatrix<S> grad;
  S* grad_input = nullptr;  // or null
  int lowest = 0;           // the first layer that a gradient is asked of
  int64_t sums_stride = 0;  // from the sums of one block to the next one's
  // On tensor cores: the weights of all layers stay in shared memory, for 0, or come to one place, or two by turns.
  int slots = 0;
  int weight_elements = 0;  // of shared memory for them
  FusedLayer<S> layer[most_fused_layers];
};

// The second stage of backward: what the sums of all blocks, [count, stride], add up to, and where it goes.
template <class S> struct FusedSums {
  struct Segment {
    int begin = 0, end = 0;
    S* output = nullptr;
  };
  const Compute<S>* partials = nullptr;
  int64_t count = 0, stride = 0;
  int segments = 0;
  Segment segment[2 * most_fused_layers];
};

}  // namespace fastmlp::cuda

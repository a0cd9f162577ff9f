// The argument of the kernels that run a whole network of narrow layers in one launch, forward or backward: fused.cuh,
// and for 16-bit dtypes fused_mma_forward.cuh and fused_mma_backward.cuh. Filled by narrow.cu from problem.h;
// fused_plan.cuh adds where the weights lie in shared memory.
#pragma once

#include <cstdint>

#include "product.h"

namespace fastmlp::cuda {

constexpr int fused_width = 128;       // the widest layer
constexpr int most_fused_layers = 16;  // as many as fit into a kernel's argument

// The shape of the kernels on tensor cores for layers of up to W features: a warp's fragments of 16 rows, a block's
// threads, and how many blocks of a multiprocessor have enough registers. Backward has `stages` tiles of inputs, the
// second for the next layer's. A warp owns part_rows x part_columns of the gradient of weights; of `held` layers these
// stay in registers.
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

// The number of features that products of fragments compute with, in place of so many.
constexpr int padded(int features) { return features <= 16 ? 16 : features <= 32 ? 32 : features <= 64 ? 64 : 128; }

constexpr int rows_inside(int64_t first, int64_t rows, int most) {
  return rows - first < most ? int(rows - first) : most;
}

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
  int place = 0;  // on tensor cores: where the weights begin in shared memory if all layers' are resident
  // backward: what forward kept, and the first block's sums, if not null
  StridedMatrix<S> saved;
  bool keeps_output = false;
  bool differentiates = false;  // the activation is not the identity
  C* weight_sums = nullptr;
  C* bias_sums = nullptr;
  int held = -1;  // on tensor cores: which of the sums in registers are this layer's; -1 if none
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
  // Weight slots in shared memory, on tensor cores: 0 = all layers resident; 1 = reloaded per layer; 2 =
  // double-buffered.
  int slots = 0;
  int weight_elements = 0;  // elements of shared memory that the slots take
  FusedLayer<S> layer[most_fused_layers];
};

// The argument of backward's second stage, sum_fused (rows.cuh): the sums of all blocks, [count, stride], and which of
// their columns go to which gradient.
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

// What the kernels of fused.cuh compute: a whole network of narrow layers, forward or backward, in one launch. Filled
// by network.cu from problem.h; their whole argument.
#pragma once

#include <cstdint>

#include "product.h"

namespace fastmlp::cuda {

constexpr int fused_width = 128;                                  // the widest layer
constexpr int most_fused_layers = 16;                             // so many fit into a kernel's argument
constexpr int fused_forward_rows = 64, fused_backward_rows = 32;  // that go through all layers together

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
  // backward: what forward kept, and the sums of each block, [blocks, ...], if not null
  StridedMatrix<S> saved;
  bool keeps_output = false;
  C* weight_sums = nullptr;
  C* bias_sums = nullptr;
};

template <class S> struct FusedNetwork {
  int64_t rows = 0;
  int layers = 0;
  StridedMatrix<S> input;
  // backward
  StridedMatrix<S> grad;
  S* grad_input = nullptr;  // or null
  int lowest = 0;           // the first layer that a gradient is asked of
  FusedLayer<S> layer[most_fused_layers];
};

}  // namespace fastmlp::cuda

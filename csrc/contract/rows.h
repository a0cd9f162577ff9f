// The torch-free contract of passes over the rows of a matrix: layer normalisation and softmax, and their gradients.
// Filled by capture/row_nodes.cpp, executed by cpu/rows.cpp. All is float32 or float64, row-major and without gaps.
#pragma once

#include "problem.h"

namespace fastmlp {

struct RowsShape {
  DType dtype = DType::float32;
  int64_t rows = 0, columns = 0;
};

// output = (input - mean) * rstd * weight + bias, with the mean of each row, and 1 / sqrt(variance + eps).
struct LayerNormPass {
  RowsShape shape;
  const void* input = nullptr;
  const void *weight = nullptr, *bias = nullptr;  // null, or [columns]
  double eps = 0;
  void* output = nullptr;
  void *mean = nullptr, *rstd = nullptr;  // [rows]
};

struct LayerNormBackwardPass {
  RowsShape shape;
  const void *grad = nullptr, *input = nullptr;
  const void *mean = nullptr, *rstd = nullptr;  // [rows]
  const void* weight = nullptr;                 // null, or [columns]
  // Null where not asked for.
  void* grad_input = nullptr;
  void *grad_weight = nullptr, *grad_bias = nullptr;  // [columns]
};

// Wider rows are left to torch. It computes those that fill a vector as fast, and narrower ones element by element.
constexpr int64_t most_softmax_columns = 15;

// The softmax of each row, or its logarithm. At most most_softmax_columns columns.
struct SoftmaxPass {
  RowsShape shape;
  bool log = false;
  const void* input = nullptr;
  void* output = nullptr;
};

struct SoftmaxBackwardPass {
  RowsShape shape;
  bool log = false;
  const void *grad = nullptr, *output = nullptr;
  void* grad_input = nullptr;
};

}  // namespace fastmlp

// The torch-free contract of passes over the rows of a matrix: layer normalisation, batch normalisation and softmax,
// and their gradients. Filled by capture/row_nodes.cpp, executed by cpu/rows.cpp. All is float32 or float64, row-major
// and without gaps.
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

// output = (input - mean) * rstd * weight + bias, with the mean of each column, and 1 / sqrt(variance + eps): those of
// the batch in training, the running ones else. There are a row and a column at least.
struct BatchNormPass {
  RowsShape shape;
  bool training = false;
  const void* input = nullptr;
  const void *weight = nullptr, *bias = nullptr;  // null, or [columns]
  // [columns]; null only in training, which moves them by `momentum` towards those of the batch, the variance that of
  // a sample (divided by rows - 1).
  void *running_mean = nullptr, *running_variance = nullptr;
  double momentum = 0, eps = 0;
  void* output = nullptr;                 // null where not asked for
  void *mean = nullptr, *rstd = nullptr;  // [columns], of the batch; null where not asked for
};

struct BatchNormBackwardPass {
  RowsShape shape;
  const void *grad = nullptr, *input = nullptr;
  const void* mean = nullptr;  // [columns]
  // [columns], one of them null: what training made of the batch, which depends on the input, or what does not.
  const void *rstd = nullptr, *running_variance = nullptr;
  double eps = 0;
  const void* weight = nullptr;  // null, or [columns]
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

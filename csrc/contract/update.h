// The torch-free contract of an optimizer's step: by which rule a parameter moves, with which numbers, and where its
// gradient and state lie. Filled by optimizer.cpp, executed by cpu/update.cpp. Holds no arithmetic.
#pragma once

#include "problem.h"

namespace fastmlp {

enum class Rule { sgd, adam };

// The numbers of one parameter's step, as torch.optim names them.
struct UpdateSpec {
  Rule rule = Rule::sgd;
  bool maximize = false;
  double lr = 0;
  double weight_decay = 0;
  // SGD. Without momentum there is no buffer.
  double momentum = 0, dampening = 0;
  bool nesterov = false;
  bool first = false;  // the buffer holds nothing yet: it becomes the gradient
  // Adam. The bias corrections are in step_size and root: lr / (1 - beta1^t), sqrt(1 - beta2^t).
  bool decoupled = false;  // the weight decay of AdamW
  double beta1 = 0, beta2 = 0, eps = 0, step_size = 0, root = 1;
};

// All tensors are dense and lie alike, so that the i-th element of each belongs together.
struct Update {
  DType dtype = DType::float32;
  int64_t n = 0;
  void* parameter = nullptr;
  const void* grad = nullptr;
  // SGD: the momentum buffer or null. Adam: exp_avg, exp_avg_sq, and max_exp_avg_sq or null.
  void* state[3] = {};
  UpdateSpec spec;
};

}  // namespace fastmlp

// What follows the products of a tile, as the callers of the kernels see it. Used by gemm_task.h, row_product.h and the
// frozen networks. Computes nothing itself.
#pragma once

#include "../contract/activation_info.h"
#include "../contract/problem.h"

namespace fastmlp::cpu {

// Identity and ReLU need no epilogue, because the kernels of products apply them, and the bias, to sums that are still
// in registers. The other activations are applied to sums in memory, by a function of their own.
inline bool is_relu(const ActivationSpec& activation) { return activation.kind == relu_kind; }
inline bool needs_epilogue(const ActivationSpec& activation) {
  return activation.kind != identity_kind && !is_relu(activation);
}

}  // namespace fastmlp::cpu

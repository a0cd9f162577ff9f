// Narrow networks in one kernel, forward or backward: fused.cuh for float32, fused_mma_forward.cuh and
// fused_mma_backward.cuh for 16-bit dtypes. Called by network.cu, which runs all other networks; knows no tensors.
#pragma once

#include "../contract/problem.h"
#include "products.h"

namespace fastmlp::cuda {

// Whether the functions below take the network: by its dtype, widths and rows.
bool goes_fused(const Context& context, const Network& network);

void forward_fused(const Context& context, const ForwardPass& pass);
void backward_fused(const Context& context, const BackwardPass& pass);

}  // namespace fastmlp::cuda

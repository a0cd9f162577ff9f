// Narrow networks in one kernel, forward or backward (fused.cuh). Called by network.cu.
#pragma once

#include "../contract/problem.h"
#include "products.h"

namespace fastmlp::cuda {

// Whether the functions below take the network: by its dtype, widths and rows.
bool goes_fused(const Context& context, const Network& network);

void forward_fused(const Context& context, const ForwardPass& pass);
void backward_fused(const Context& context, const BackwardPass& pass);

}  // namespace fastmlp::cuda

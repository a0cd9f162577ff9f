// Derivatives of narrow networks along their input, forward and backward (contract/derivatives.h). Called by
// register.cpp. Baseline code: products are those of row_product.h, and activations are behind the table of the
// instruction set.
#pragma once

#include "../contract/derivatives.h"

namespace fastmlp::cpu {

// Results have the same bits for any number of threads. What forward keeps does not depend on the instruction set
// either, which may change before backward.
void derivatives(const DerivativesForward& pass, int threads);
void derivatives_backward(const DerivativesBackward& pass, int threads);

}  // namespace fastmlp::cpu

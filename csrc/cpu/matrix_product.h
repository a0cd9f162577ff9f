// A product of a tape's node on the CPU. Called by register.cpp, and chooses between the row kernels, which pack
// nothing of a, and the macro-kernel of gemm.h. Must stay baseline code: arithmetic is behind the table of the
// instruction set.
#pragma once

#include "../contract/product.h"

namespace fastmlp::cpu {

// The result has the same bits for any number of threads.
void multiply(const ProductPass& pass, int threads);

}  // namespace fastmlp::cpu

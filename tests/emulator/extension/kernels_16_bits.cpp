// As kernels.cpp.
#pragma GCC visibility push(default)

#include "cuda/dtypes/bfloat16.cu"
#include "cuda/dtypes/float16.cu"

#pragma GCC visibility pop

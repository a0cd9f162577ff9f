// As kernels.cpp.
#include "cuda/dtypes/bfloat16.cu"
#include "cuda/dtypes/float16.cu"

// The kernels of bfloat16; nothing else, so that the four dtypes compile side by side.
#include "../products.cuh"

template struct fastmlp::cuda::Kernels<fastmlp::BFloat16>;

// The kernels of float16; nothing else, so that the four dtypes compile side by side.
#include "../products.cuh"

template struct fastmlp::cuda::Kernels<fastmlp::Float16>;

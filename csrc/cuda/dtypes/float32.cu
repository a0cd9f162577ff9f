// The kernels of float32; nothing else, so that the four dtypes compile side by side.
#include "../products.cuh"

template struct fastmlp::cuda::Kernels<float>;

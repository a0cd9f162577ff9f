// The kernels of float64; nothing else, so that the four dtypes compile side by side.
#include "../products.cuh"

template struct fastmlp::cuda::Kernels<double>;

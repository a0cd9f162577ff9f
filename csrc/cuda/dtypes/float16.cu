// All kernels of float16 and their launches (products.h). A file of its own, so that the four dtypes compile side by
// side; setup.py compiles it, and the tests' emulator includes it. Holds nothing else: what one dtype alone needs is in
// products.cuh too.
#include "../products.cuh"

template struct fastmlp::cuda::Kernels<fastmlp::Float16>;

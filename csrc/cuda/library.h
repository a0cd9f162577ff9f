// The products that products.cuh leaves to PyTorch, on raw pointers of a device. Included by the files that know
// torch: register.cpp, and the tests' extension, where the device is the CPU.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include "../tensors/dtypes.h"
#include "products.h"

namespace fastmlp::cuda {

// On the current stream.
inline void multiply_by_torch(const LibraryProduct& p, c10::Device device) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto options = at::TensorOptions(device).dtype(scalar_type_of(p.dtype));
  const auto view = [&](void* data, at::IntArrayRef sizes, at::IntArrayRef strides) {
    return at::for_blob(data, sizes).strides(strides).target_device(device).options(options).make_tensor();
  };
  const auto matrix = [&](const Matrix& x, int64_t rows, int64_t columns) {
    return view(x.data, {rows, columns}, {x.row_stride, x.column_stride});
  };
  at::Tensor output = view(p.output, {p.m, p.n}, {p.n, 1});
  const at::Tensor a = matrix(p.a, p.m, p.k), b = matrix(p.b, p.k, p.n);
  if (p.bias.data) {
    at::addmm_out(output, view(p.bias.data, {p.n}, {p.bias.stride}), a, b);
  } else {
    at::mm_out(output, a, b);
  }
}

}  // namespace fastmlp::cuda

// The only file of the CUDA device that knows torch: device guard, current stream, torch's caching allocator, and the
// operators for the dispatcher. What it shares with other devices is in operations.h. Never waits for the device.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <atomic>

#include "../devices.h"
#include "../operations.h"
#include "network.h"

namespace fastmlp::cuda {
namespace {

// 80 for compute capability 8.0.
int architecture_of(int device) {
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return 10 * major + minor;
}

// For tests and measurements: what passes run with in place of the table's choice.
struct Forced {
  std::atomic<int> tile{-1};
  std::atomic<bool> fuses{true};
};
Forced forced;

void set_up(int64_t tile, bool fuses) {
  TORCH_CHECK_VALUE(tile >= -1 && tile <= library_call, "fastmlp: tile is ", tile, ", expected -1 to ",
                    int(library_call));
  forced.tile = int(tile);
  forced.fuses = fuses;
}

at::ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return at::kFloat;
    case DType::float64:
      return at::kDouble;
    case DType::bfloat16:
      return at::kBFloat16;
    case DType::float16:
      return at::kHalf;
  }
  TORCH_INTERNAL_ASSERT(false);
}

// By at::mm or at::addmm, on the current stream.
void multiply_by_torch(const LibraryProduct& p, c10::Device device) {
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

struct Device {
  static constexpr const char* name = "CUDA";

  static at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like) {
    return at::empty(sizes, at::TensorOptions(like.device()).dtype(like.scalar_type()));
  }

  static void run(const ForwardPass& pass, const at::Tensor& input) {
    with_context(input, [&](const Context& context) { cuda::forward(context, pass); });
  }

  static void run(const BackwardPass& pass, const at::Tensor& input) {
    with_context(input, [&](const Context& context) { cuda::backward(context, pass); });
  }

 private:
  template <class F> static void with_context(const at::Tensor& input, const F& function) {
    const c10::cuda::CUDAGuard guard(input.device());
    // Freed before the kernels have run: the allocator hands it out again in the order of the stream only.
    at::Tensor workspace;
    Context context;
    context.architecture = architecture_of(input.device().index());
    context.stream = c10::cuda::getCurrentCUDAStream().stream();
    if (forced.tile >= 0) context.tile = TileSize(forced.tile.load());
    context.fuses = forced.fuses;
    context.tf32 = at::globalContext().allowTF32CuBLAS();
    context.library = [&](const LibraryProduct& product) { multiply_by_torch(product, input.device()); };
    context.allocate = [&](size_t bytes) {
      workspace = at::empty({int64_t(bytes)}, at::TensorOptions(input.device()).dtype(at::kByte));
      return workspace.data_ptr();
    };
    function(context);
  }
};

using Cuda = Operations<Device>;

const RegisterDevice registered(c10::kCUDA, {&Cuda::forward, &Cuda::infer, &Cuda::backward});

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastmlp, m) { m.def("cuda_set_up(int tile, bool fuses) -> ()", &set_up); }

TORCH_LIBRARY_IMPL(fastmlp, CUDA, m) {
  m.impl("forward", &Cuda::forward_op);
  m.impl("infer", &Cuda::infer_op);
  m.impl("backward", &Cuda::backward_op);
}

}  // namespace fastmlp::cuda

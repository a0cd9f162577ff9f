// The only file of the CUDA device that knows torch: device guard, current stream, torch's caching allocator, and the
// operators for the dispatcher. What it shares with other devices is in operations.h. Never waits for the device.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

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
    context.allocate = [&](size_t bytes) {
      workspace = at::empty({int64_t(bytes)}, at::TensorOptions(input.device()).dtype(at::kByte));
      return workspace.data_ptr();
    };
    function(context);
  }
};

using Cuda = Operations<Device>;

const RegisterDevice registered(c10::kCUDA, {&Cuda::forward, &Cuda::infer, &Cuda::backward, &Cuda::forward_into});

}  // namespace

TORCH_LIBRARY_IMPL(fastmlp, CUDA, m) {
  m.impl("forward", &Cuda::forward_op);
  m.impl("infer", &Cuda::infer_op);
  m.impl("backward", &Cuda::backward_op);
}

}  // namespace fastmlp::cuda

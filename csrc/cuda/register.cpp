// Enters CUDA into the table of devices and its operators into the dispatcher. With library.h, its products, the only
// file of the device that knows torch: device guard, current stream, and torch's caching allocator. What all devices do
// alike is in operations.h. Must not wait for the device, unless the user has asked for measurements.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/CUDAGraphsUtils.cuh>
#include <ATen/cuda/Sleep.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <atomic>
#include <map>

#include "../tensors/devices.h"
#include "../tensors/dtypes.h"
#include "../tensors/operations.h"
#include "library.h"
#include "measured.h"
#include "network.h"
#include "tuning.h"

namespace fastmlp::cuda {
namespace {

// What CUDA says of the device; torch asks once of each.
Card card_of(c10::DeviceIndex device) {
  const cudaDeviceProp& properties = *at::cuda::getDeviceProperties(device);
  Card card;
  card.architecture = 10 * properties.major + properties.minor;
  card.multiprocessors = properties.multiProcessorCount;
  card.shared_bytes = int64_t(properties.sharedMemPerMultiprocessor);
  card.block_shared_bytes = int64_t(properties.sharedMemPerBlockOptin);
  card.reserved_bytes = int64_t(properties.reservedSharedMemPerBlock);
  return card;
}

const char* obstacle_on(c10::DeviceIndex device) {
  const c10::cuda::CUDAGuard guard(device);
  return obstacle();
}

// For tests and measurements: what passes run with in place of the table's choice.
struct Forced {
  std::atomic<int> tile{-1}, fuses{-1};
};
Forced forced;

// Negative: by tiles.h.
void set_up(int64_t tile, int64_t fuses) {
  TORCH_CHECK_VALUE(tile >= -1 && tile <= library_call, "fastmlp: tile is ", tile, ", expected -1 to ",
                    int(library_call));
  forced.tile = int(tile);
  forced.fuses = fuses < 0 ? -1 : int(fuses > 0);
}

Measured measured;

// Nine numbers each, for the file that Python keeps: those of ProductKey in its order, and the tile.
constexpr size_t numbers_of_choice = 9;

std::vector<int64_t> choices() {
  std::vector<int64_t> all;
  for (const auto& [key, tile] : measured.all()) {
    for (const int64_t number : {int64_t(key.architecture), key.multiprocessors, int64_t(key.dtype),
                                 int64_t(key.epilogue), int64_t(key.vectors), key.m, key.n, key.k, int64_t(tile)})
      all.push_back(number);
  }
  return all;
}

void add_choices(at::IntArrayRef all) {
  TORCH_CHECK_VALUE(all.size() % numbers_of_choice == 0, "fastmlp: choices has ", all.size(),
                    " numbers, expected a multiple of ", numbers_of_choice);
  for (size_t i = 0; i < all.size(); i += numbers_of_choice) {
    const int64_t* const x = &all[i];
    TORCH_CHECK_VALUE(x[0] > 0 && x[0] < 1000 && x[1] > 0 && x[2] >= 0 && x[2] <= int64_t(DType::float16) &&
                          x[3] >= 0 && x[3] <= int64_t(Epilogue::wgrad) && x[5] >= 0 && x[6] >= 0 && x[7] >= 0 &&
                          x[8] >= 0 && x[8] <= library_call,
                      "fastmlp: choices[", i / numbers_of_choice, "] is none of a product");
  }
  for (size_t i = 0; i < all.size(); i += numbers_of_choice) {
    const int64_t* const x = &all[i];
    measured.add({int(x[0]), x[1], DType(x[2]), Epilogue(x[3]), x[4] != 0, x[5], x[6], x[7]}, TileSize(x[8]));
  }
}

// Returns what it was before.
bool measure(bool enabled) { return measured.measure(enabled); }

struct Device {
  static constexpr const char* name = "CUDA";
  static constexpr c10::DispatchKey backend = c10::DispatchKey::CUDA, autograd = c10::DispatchKey::AutogradCUDA,
                                    autocast = c10::DispatchKey::AutocastCUDA;

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
    static_cast<Card&>(context) = card_of(input.device().index());
    context.stream = c10::cuda::getCurrentCUDAStream().stream();
    if (forced.tile >= 0) context.tile = TileSize(forced.tile.load());
    if (forced.fuses >= 0) context.fuses = forced.fuses > 0;
    // Not allowTF32CuBLAS(), which raises where the setting was made by its newer name.
    context.tf32 = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
                   at::Float32Precision::TF32;
    context.library = [&](const LibraryProduct& product) { multiply_by_torch(product, input.device()); };
    context.allocate = [&](size_t bytes) {
      workspace = at::empty({int64_t(bytes)}, at::TensorOptions(input.device()).dtype(at::kByte));
      return workspace.data_ptr();
    };
    // A pass plans its products twice, for memory and for launches: others may measure, or add choices, in between.
    std::map<ProductKey, std::optional<TileSize>> chosen;
    if (measured.is_used()) {
      context.measured = [&](const ProductKey& key) {
        const auto [place, is_new] = chosen.try_emplace(key);
        if (is_new) place->second = choose(context, key, input);
        return place->second;
      };
    }
    function(context);
  }

  static std::optional<TileSize> choose(const Context& context, const ProductKey& key, const at::Tensor& input) {
    const std::optional<TileSize> found = measured.find(key);
    const bool empty = key.m == 0 || key.n == 0 || key.k == 0;
    if (found || empty || !measured.measures() ||
        at::cuda::currentStreamCaptureStatus() != at::cuda::CaptureStatus::None)
      return found;
    // A generator of its own: the user's random numbers stay as they are.
    const at::Generator generator = at::cuda::detail::createCUDAGenerator(input.device().index());
    Tensors memory;
    Context alone = context;
    alone.measured = nullptr;
    try {
      const auto random = [&](int64_t elements) {
        memory.push_back(at::empty({elements}, at::TensorOptions(input.device()).dtype(scalar_type_of(key.dtype))));
        return memory.back().uniform_(-1, 1, generator).data_ptr();
      };
      const std::optional<TileSize> tile = fastest(alone, key, random, &at::cuda::sleep);
      if (tile) measured.add(key, *tile);
      return tile;
    } catch (const c10::OutOfMemoryError&) {
      // Measuring takes operands of its own. What leaves no room for these goes by the table.
      return std::nullopt;
    }
  }
};

using Cuda = Operations<Device>;

const RegisterDevice registered(c10::kCUDA, [] {
  DeviceOperations all = Cuda::entry();
  all.obstacle = &obstacle_on;
  return all;
}());

}  // namespace

// Not among the operators of networks: nothing of it is computed, or captured by a compiler.
TORCH_LIBRARY(fastmlp_cuda, m) {
  m.def("set_up(int tile, int fuses) -> ()", &set_up);
  m.def("measure(bool enabled) -> bool", &measure);
  m.def("choices() -> int[]", &choices);
  m.def("add_choices(int[] choices) -> ()", &add_choices);
}

TORCH_LIBRARY_IMPL(fastmlp, CUDA, m) {
  m.impl("forward", &Cuda::forward_op);
  m.impl("infer", &Cuda::infer_op);
  m.impl("backward", &Cuda::backward_op);
}

}  // namespace fastmlp::cuda

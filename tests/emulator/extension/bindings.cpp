// _C_emulated: forward and backward of csrc/cuda, run by the emulator on CPU tensors. For tests only, which build it
// (tests/support/emulated.py) and pass the card whose choices are wanted. Results and scratch memory start as NaN, so
// that what a kernel leaves out shows.
#include <torch/extension.h>

#include "cuda/library.h"
#include "cuda/network.h"
#include "tensors/devices.h"
#include "tensors/dtypes.h"
#include "emulated.h"
#include "tensors/operations.h"
#include "contract/storage.h"

namespace fastmlp::emulated {
namespace {

// Of the usual card of each architecture, for tests that do not care which: T4, A100, RTX 3090, RTX 4090, H100, B200,
// RTX 5090. The library itself has no such table.
cuda::Card usual_card(int architecture) {
  constexpr int64_t kib = 1 << 10;
  constexpr cuda::Card cards[] = {
      {75, 40, 64 * kib, 64 * kib, 0},      {80, 108, 164 * kib, 163 * kib, kib}, {86, 82, 100 * kib, 99 * kib, kib},
      {89, 128, 100 * kib, 99 * kib, kib},  {90, 132, 228 * kib, 227 * kib, kib}, {100, 148, 228 * kib, 227 * kib, kib},
      {120, 170, 100 * kib, 99 * kib, kib},
  };
  for (const cuda::Card& card : cards) {
    if (card.architecture == architecture) return card;
  }
  throw py::value_error("there is no usual card of sm_" + std::to_string(architecture));
}

// Architecture and the numbers of cuda::Card behind it, or the architecture alone.
using CardNumbers = std::variant<int, std::array<int64_t, 5>>;
cuda::Card card_of(const CardNumbers& numbers) {
  if (const int* const architecture = std::get_if<int>(&numbers)) return usual_card(*architecture);
  const auto& x = std::get<1>(numbers);
  return {int(x[0]), x[1], x[2], x[3], x[4]};
}

cuda::Card card = usual_card(80);
std::optional<cuda::TileSize> tile;
bool fuses = true;

struct Device {
  static constexpr const char* name = "CUDA";
  static constexpr c10::DispatchKey backend = c10::DispatchKey::CUDA, autograd = c10::DispatchKey::AutogradCUDA,
                                    autocast = c10::DispatchKey::AutocastCUDA;

  static at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like) {
    return at::full(sizes, NAN, like.options());
  }

  template <class Pass, class Function> static void with_context(const Pass& pass, const Function& function) {
    at::Tensor workspace;
    cuda::Context context;
    static_cast<cuda::Card&>(context) = card;
    context.tile = tile;
    context.fuses = fuses;
    // Only where a test asks for it: the table knows an architecture's library, and this one is the CPU's.
    if (tile == cuda::library_call)
      context.library = [](const cuda::LibraryProduct& product) { cuda::multiply_by_torch(product, at::kCPU); };
    context.allocate = [&](size_t bytes) {
      TORCH_CHECK(!workspace.defined(), "a pass allocates its workspace once");
      workspace = at::full({int64_t(bytes)}, 0xff, at::kByte);
      return workspace.data_ptr();
    };
    function(context, pass);
  }

  static void run(const ForwardPass& pass, const at::Tensor&) { with_context(pass, &cuda::forward); }
  static void run(const BackwardPass& pass, const at::Tensor&) { with_context(pass, &cuda::backward); }
};

using Emulated = Operations<Device>;

// What devices.cpp asks of GPUs: those with an odd index have no code.
std::vector<int> asked;
const char* obstacle_on(c10::DeviceIndex device) {
  asked.push_back(device);
  set_code(device % 2 == 0);
  const char* const why = cuda::obstacle();
  set_code(true);
  return why;
}

const RegisterDevice registered(c10::kCUDA, [] {
  DeviceOperations all = Emulated::entry();
  all.obstacle = &obstacle_on;
  return all;
}());

// How a product of these sizes goes on a card whose library can be called: the tile as tiles.h numbers it, the rows and
// columns of tiles, and the parts of k.
std::array<int64_t, 4> plan(const CardNumbers& numbers, const std::string& epilogue, int64_t m, int64_t n, int64_t k,
                            const at::Tensor& like) {
  cuda::Context context;
  static_cast<cuda::Card&>(context) = card_of(numbers);
  context.library = [](const cuda::LibraryProduct&) {};
  return with_storage(*dtype_of(like.scalar_type()), [&](auto storage) -> std::array<int64_t, 4> {
    using S = decltype(storage);
    cuda::Product<S> p;
    p.m = m;
    p.n = n;
    p.k = k;
    // Aligned and without gaps.
    const bool forward = epilogue == "forward", wgrad = epilogue == "wgrad";
    p.a = wgrad ? cuda::Operand<S>{nullptr, 1, m} : cuda::Operand<S>{nullptr, k, 1};
    p.b = forward ? cuda::Operand<S>{nullptr, k, 1} : cuda::Operand<S>{nullptr, 1, n};
    const auto kind = forward ? cuda::Epilogue::forward : wgrad ? cuda::Epilogue::wgrad : cuda::Epilogue::dgrad;
    const cuda::Plan plan = cuda::Kernels<S>::plan(context, kind, p);
    return {plan.tile, plan.row_tiles, plan.column_tiles, plan.parts};
  });
}

// Blocks of a fused backward whose layers have these widths.
int64_t fused_blocks(const CardNumbers& numbers, int64_t rows, const std::vector<int>& widths, const at::Tensor& like) {
  cuda::Context context;
  static_cast<cuda::Card&>(context) = card_of(numbers);
  return with_storage(*dtype_of(like.scalar_type()), [&](auto storage) {
    cuda::FusedNetwork<decltype(storage)> p;
    p.rows = rows;
    p.layers = int(widths.size()) - 1;
    for (int l = 0; l < p.layers; l++) {
      p.layer[l].in_features = widths[size_t(l)];
      p.layer[l].out_features = widths[size_t(l) + 1];
    }
    return cuda::Kernels<decltype(storage)>::fused_blocks(context, p);
  });
}

py::tuple tuned(const CardNumbers& numbers, const at::Tensor& like, const std::array<double, 5>& times) {
  cuda::Context context;
  static_cast<cuda::Card&>(context) = card_of(numbers);
  // No pass follows it, whoever multiplies.
  cuda::ProductKey key{context.architecture, context.multiprocessors, *dtype_of(like.scalar_type()),
                       cuda::Epilogue::wgrad};
  key.m = key.n = key.k = 8;
  const Tuned found = tune(context, key, {times[0], times[1], times[2], times[3], times[4]});
  return py::make_tuple(found.tile ? py::object(py::int_(int(*found.tile))) : py::none(), found.calls);
}

}  // namespace

}  // namespace fastmlp::emulated

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fastmlp;
  using namespace fastmlp::emulated;
  py::class_<Stack, c10::intrusive_ptr<Stack>>(m, "Stack", py::module_local())
      .def(py::init<std::vector<bool>, std::vector<int64_t>, std::vector<double>>());
  m.def("forward", [](const Stack& stack, const at::Tensor& input, const Tensors& parameters) {
    return Emulated::forward(stack, input, parameters);
  });
  m.def("infer", [](const Stack& stack, const at::Tensor& input, const Tensors& parameters) {
    return Emulated::infer(stack, input, parameters);
  });
  m.def("backward", [](const Stack& stack, const at::Tensor& grad, const at::Tensor& input, const Tensors& saved,
                       const Tensors& parameters, const std::vector<bool>& needs) {
    return Emulated::backward(stack, grad, input, saved, parameters, needs);
  });
  m.def("forward_into",
        [](const Stack& stack, const at::Tensor& input, const Tensors& parameters, const at::Tensor& output,
           const Tensors& hidden) { Emulated::forward_into(stack, input, parameters, output, hidden); });
  m.def("backward_into", [](const Stack& stack, const at::Tensor& grad, const at::Tensor& input, const Tensors& saved,
                            const Tensors& parameters, const Tensors& grads) {
    Emulated::backward_into(stack, grad, input, saved, parameters, grads);
  });
  // What the next passes run with; a negative tile leaves the choice to the table.
  m.def("set_up", [](const CardNumbers& numbers, int tile_, const std::string& order, bool fuses_) {
    card = card_of(numbers);
    // As on the smallest card from sm_80 on: the library asks for no more on the others.
    set_shared_limit(std::min<int64_t>(card.block_shared_bytes, 99 << 10));
    fuses = fuses_;
    tile = tile_ < 0 ? std::nullopt : std::optional(cuda::TileSize(tile_));
    set_order(order);
  });
  m.def("plan", &plan);
  m.def("fused_blocks", &fused_blocks);
  // For a gradient of weights, 8 x 8 x 8: the tile or None, and the calls. `times` are those of emulated.h.
  m.def("tune", &tuned);
  m.def("device_obstacle", [](const std::string& device) -> std::optional<std::string> {
    const char* why = device_obstacle(c10::Device(device));
    return why ? std::optional<std::string>(why) : std::nullopt;
  });
  // The GPUs that were asked whether there is code for them.
  m.def("asked", [] { return asked; });
  // The launch of this number from now on, from 0, fails; a negative number: none.
  m.def("refuse_launch", &refuse_launch);
  // The architecture whose translated kernels run, or 0: those of the host compiler.
  m.def("set_route", &set_route);
  m.def("take_executed", &take_executed);
  m.def("set_profile", &set_profile);
  m.def("take_profile", &take_profile);
  // BM, BN and BK by falling size.
  m.def("tiles", [](int architecture, const at::Tensor& like) {
    cuda::Context context;
    context.architecture = architecture;
    return with_storage(*dtype_of(like.scalar_type()), [&](auto storage) {
      std::vector<std::array<int64_t, 3>> shapes;
      for (const cuda::TileShape& tile : cuda::Kernels<decltype(storage)>::tiles(context))
        shapes.push_back({tile.bm, tile.bn, tile.bk});
      return shapes;
    });
  });
}

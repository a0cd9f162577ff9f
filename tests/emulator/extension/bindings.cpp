// _C_emulated: forward and backward of csrc/cuda, run by the emulator on CPU tensors. For tests only, which build it
// (tests/emulated.py) and pass the architecture whose tiles are wanted. Results and scratch memory start as NaN, so
// that what a kernel leaves out shows.
#include <torch/extension.h>

#include "cuda/library.h"
#include "cuda/network.h"
#include "emulated.h"
#include "operations.h"
#include "storage.h"

namespace fastmlp::emulated {
namespace {

int architecture = 80;
std::optional<cuda::TileSize> tile;
bool fuses = true;

struct Device {
  static constexpr const char* name = "CUDA";

  static at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like) {
    return at::full(sizes, NAN, like.options());
  }

  template <class Pass, class Function> static void with_context(const Pass& pass, const Function& function) {
    at::Tensor workspace;
    cuda::Context context;
    context.architecture = architecture;
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
  m.def("set_up", [](int architecture_, int tile_, const std::string& order, bool fuses_) {
    architecture = architecture_;
    set_shared_limit(architecture);
    fuses = fuses_;
    tile = tile_ < 0 ? std::nullopt : std::optional(cuda::TileSize(tile_));
    set_order(order);
  });
  // The launch of this number from now on, from 0, fails; a negative number: none.
  m.def("refuse_launch", &refuse_launch);
  // The architecture whose translated kernels run, or 0: those of the host compiler.
  m.def("set_route", &set_route);
  m.def("take_executed", &take_executed);
  m.def("set_profile", &set_profile);
  m.def("take_profile", &take_profile);
  // BM, BN and BK by falling size.
  m.def("tiles", [](int architecture_, const at::Tensor& like) {
    cuda::Context context;
    context.architecture = architecture_;
    return with_storage(*dtype_of(like.scalar_type()), [&](auto storage) {
      std::vector<std::array<int64_t, 3>> shapes;
      for (const cuda::TileShape& tile : cuda::Kernels<decltype(storage)>::tiles(context))
        shapes.push_back({tile.bm, tile.bn, tile.bk});
      return shapes;
    });
  });
}

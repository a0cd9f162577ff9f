// The nodes of a tape that kernels of ours compute, as Python adds them; and the same kernels on tensors by themselves,
// for tests. Called by fastmlp/tape/.
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../capture/product_node.h"
#include "../contract/activation_info.h"
#include "capture.h"

namespace fastmlp {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

ActivationSpec activation_of(const std::string& name, const std::vector<double>& scalars) {
  ActivationSpec spec;
  while (spec.kind < Activations::size && name != activation_info(spec.kind).name) spec.kind++;
  TORCH_CHECK_VALUE(spec.kind < Activations::size, "fastmlp: capture: there is no activation ", name);
  if (!scalars.empty()) spec.scalars.a = scalars[0];
  if (scalars.size() > 1) spec.scalars.b = scalars[1];
  return spec;
}

std::unique_ptr<ProductNode> product(at::Tensor a, at::Tensor b, MaybeTensor bias, const std::string& activation,
                                     const std::vector<double>& scalars, at::Tensor output, MaybeTensor pre_activation,
                                     MaybeTensor row_sums) {
  const auto given = [](MaybeTensor& tensor) { return tensor ? std::move(*tensor) : at::Tensor(); };
  ProductTensors tensors{std::move(a),      std::move(b),          given(bias),
                         std::move(output), given(pre_activation), given(row_sums)};
  return std::make_unique<ProductNode>(std::move(tensors), activation_of(activation, scalars));
}

// A method of Tape that adds what `make` returns, and a function that runs it at once.
template <class Result, class... Args>
void add_node(py::module_& m, py::class_<Tape, std::shared_ptr<Tape>>& tape, const char* method, const char* function,
              Result (*make)(Args...)) {
  tape.def(method, [make](Tape& to, Args... args, std::string place) {
    to.add_node(make(std::forward<Args>(args)...), std::move(place));
  });
  m.def(function, [make](Args... args) {
    const auto node = make(std::forward<Args>(args)...);
    const py::gil_scoped_release release;
    node->run();
  });
}

}  // namespace

void add_capture_nodes(py::module_& m, py::class_<Tape, std::shared_ptr<Tape>>& tape) {
  add_node(m, tape, "add_product", "multiply", &product);
}

}  // namespace fastmlp

// The nodes of a tape that kernels of ours compute, as Python adds them; and, for tests, the same kernels on ordinary
// tensors. Called by fastmlp/tape/. Leaves checks to the nodes.
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../capture/draw_node.h"
#include "../capture/elementwise_node.h"
#include "../capture/index_nodes.h"
#include "../capture/product_node.h"
#include "../capture/row_nodes.h"
#include "../contract/activation_info.h"
#include "../tensors/devices.h"
#include "capture.h"

namespace fastmlp {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using MaybeGenerator = std::optional<at::Generator>;
using Instructions = std::vector<std::tuple<std::string, std::vector<int>, std::vector<double>>>;
using ElementOutputs = std::vector<std::tuple<Tensor, int, std::string, double>>;

ActivationSpec activation_of(const std::string& name, const std::vector<double>& scalars) {
  ActivationSpec spec;
  while (spec.kind < Activations::size && name != activation_info(spec.kind).name) spec.kind++;
  TORCH_CHECK_VALUE(spec.kind < Activations::size, "fastmlp: capture: there is no activation ", name);
  if (!scalars.empty()) spec.scalars.a = scalars[0];
  if (scalars.size() > 1) spec.scalars.b = scalars[1];
  return spec;
}

std::unique_ptr<ProductNode> product(Tensor a, Tensor b, MaybeTensor bias, const std::string& activation,
                                     const std::vector<double>& scalars, Tensor output, MaybeTensor pre_activation,
                                     MaybeTensor row_sums) {
  const auto given = [](MaybeTensor& tensor) { return tensor ? std::move(*tensor) : Tensor(); };
  ProductTensors tensors{std::move(a),      std::move(b),          given(bias),
                         std::move(output), given(pre_activation), given(row_sums)};
  return std::make_unique<ProductNode>(tensors, activation_of(activation, scalars));
}

std::unique_ptr<ElementwiseNode> elementwise(const std::vector<Tensor>& inputs, const Instructions& instructions,
                                             const ElementOutputs& outputs) {
  std::vector<ElementwiseNode::Instruction> all;
  for (const auto& [name, operands, scalars] : instructions) all.push_back({name, operands, scalars});
  std::vector<ElementwiseNode::Output> ends;
  for (const auto& [tensor, source, how, scale] : outputs) ends.push_back({tensor, source, how, scale});
  return std::make_unique<ElementwiseNode>(inputs, all, ends);
}

// Of each operation how many operands and how many scalars it has.
py::dict elementwise_operations() {
  py::dict all;
  for (const ElementOperation& one : element_operations())
    all[py::str(one.name)] = py::make_tuple(one.operands, one.scalars);
  return all;
}

template <class N, class... Args> std::unique_ptr<N> made_of(Args... args) {
  return std::make_unique<N>(std::move(args)...);
}

// A method of Tape that adds what `make` returns, and a function that runs it at once.
template <class Result, class... Args>
void add(py::module_& m, py::class_<Tape, std::shared_ptr<Tape>>& tape, const char* method, const char* function,
         Result (*make)(Args...)) {
  tape.def(method, [make](Tape& to, Args... args, std::string place) {
    to.add_node(make(std::forward<Args>(args)...), std::move(place));
  });
  m.def(function, [make](Args... args) {
    const auto node = make(std::forward<Args>(args)...);
    node->find();
    const py::gil_scoped_release release;
    node->run();
  });
}

}  // namespace

void add_capture_nodes(py::module_& m, py::class_<Tape, std::shared_ptr<Tape>>& tape) {
  add(m, tape, "add_elementwise", "run_elementwise", &elementwise);
  add(m, tape, "add_product", "multiply", &product);
  add(m, tape, "add_bernoulli", "bernoulli_", &made_of<BernoulliNode, Tensor, double, MaybeGenerator>);
  add(m, tape, "add_layer_norm", "layer_norm",
      &made_of<LayerNormNode, Tensor, MaybeTensor, MaybeTensor, double, Tensor, Tensor, Tensor>);
  add(m, tape, "add_layer_norm_backward", "layer_norm_backward",
      &made_of<LayerNormBackwardNode, Tensor, Tensor, Tensor, Tensor, MaybeTensor, MaybeTensor, MaybeTensor,
               MaybeTensor>);
  add(m, tape, "add_batch_norm", "batch_norm",
      &made_of<BatchNormNode, Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, bool, double, double,
               MaybeTensor, MaybeTensor, MaybeTensor>);
  add(m, tape, "add_batch_norm_backward", "batch_norm_backward",
      &made_of<BatchNormBackwardNode, Tensor, Tensor, Tensor, MaybeTensor, MaybeTensor, double, MaybeTensor,
               MaybeTensor, MaybeTensor, MaybeTensor>);
  add(m, tape, "add_softmax", "softmax", &made_of<SoftmaxNode, Tensor, Tensor, bool>);
  add(m, tape, "add_softmax_backward", "softmax_backward", &made_of<SoftmaxBackwardNode, Tensor, Tensor, Tensor, bool>);
  add(m, tape, "add_gather", "gather", &made_of<GatherNode, Tensor, Tensor, Tensor>);
  add(m, tape, "add_scatter", "scatter", &made_of<ScatterNode, MaybeTensor, Tensor, Tensor, Tensor, bool>);
  add(m, tape, "add_row_max", "row_max", &made_of<RowMaxNode, Tensor, MaybeTensor, MaybeTensor>);
  add(m, tape, "add_take_rows", "take_rows", &made_of<TakeRowsNode, Tensor, Tensor, Tensor, std::string>);
  add(m, tape, "add_embedding_backward", "embedding_backward", &made_of<AddRowsNode, Tensor, Tensor, int64_t, Tensor>);
  add(m, tape, "add_nll_loss", "nll_loss", &made_of<NllNode, Tensor, Tensor, int64_t, bool, Tensor, Tensor>);
  add(m, tape, "add_nll_loss_backward", "nll_loss_backward",
      &made_of<NllBackwardNode, Tensor, Tensor, Tensor, int64_t, bool, Tensor>);
  m.def("elementwise_operations", &elementwise_operations);
  m.attr("most_softmax_columns") = most_softmax_columns;
  m.def("softmax_columns", [] {
    operation::SoftmaxColumns* const asked = operations_on(host.type())->softmax_columns;
    return asked ? asked() : 0;
  });
  m.def("draws_as_torch", [] {
    operation::DrawsAsTorch* const asked = operations_on(host.type())->draws_as_torch;
    return asked && asked();
  });
}

}  // namespace fastmlp

// Nodes of rows and of random numbers, as Python adds them to a tape; and, for tests, the same on ordinary tensors.
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "../capture/draw_node.h"
#include "../capture/row_nodes.h"
#include "../tensors/devices.h"
#include "capture.h"

namespace fastmlp {
namespace {

using at::Tensor;
using Generator = std::optional<at::Generator>;
using Optional = std::optional<Tensor>;

// As a tape runs it.
template <class N, class... Args> void run_node(Args... args) {
  N node(std::move(args)...);
  const py::gil_scoped_release release;
  node.run();
}

template <class N, class... Args> void add_node(Tape& tape, Args... args, std::string place) {
  tape.add_node(std::make_unique<N>(std::move(args)...), std::move(place));
}

// A node as a method of tapes, and, for tests, as a function that runs it on ordinary tensors.
template <class N, class... Args, class Class> void add(py::module_& m, Class& tape, const char* name) {
  tape.def(("add_" + std::string(name)).c_str(), &add_node<N, Args...>);
  m.def(name, &run_node<N, Args...>);
}

}  // namespace

void add_row_nodes(py::module_& m) {
  auto tape = py::reinterpret_borrow<py::class_<Tape, std::shared_ptr<Tape>>>(m.attr("Tape"));
  tape.def("add_bernoulli", &add_node<BernoulliNode, Tensor, double, Generator>);
  m.def("bernoulli_", &run_node<BernoulliNode, Tensor, double, Generator>);
  add<LayerNormNode, Tensor, Optional, Optional, double, Tensor, Tensor, Tensor>(m, tape, "layer_norm");
  add<LayerNormBackwardNode, Tensor, Tensor, Tensor, Tensor, Optional, Optional, Optional, Optional>(
      m, tape, "layer_norm_backward");
  add<SoftmaxNode, Tensor, Tensor, bool>(m, tape, "softmax");
  add<SoftmaxBackwardNode, Tensor, Tensor, Tensor, bool>(m, tape, "softmax_backward");
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

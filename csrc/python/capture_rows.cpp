// Nodes of rows and of random numbers, as Python adds them to a tape; and, for tests, the same on ordinary tensors.
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "../capture/draw_node.h"
#include "../tensors/devices.h"
#include "capture.h"

namespace fastmlp {
namespace {

using Generator = std::optional<at::Generator>;

// As a tape runs it.
template <class N, class... Args> void run_node(Args... args) {
  N node(std::move(args)...);
  const py::gil_scoped_release release;
  node.run();
}

template <class N, class... Args> void add_node(Tape& tape, Args... args, std::string place) {
  tape.add_node(std::make_unique<N>(std::move(args)...), std::move(place));
}

}  // namespace

void add_row_nodes(py::module_& m) {
  auto tape = py::reinterpret_borrow<py::class_<Tape, std::shared_ptr<Tape>>>(m.attr("Tape"));
  tape.def("add_bernoulli", &add_node<BernoulliNode, at::Tensor, double, Generator>);
  m.def("bernoulli_", &run_node<BernoulliNode, at::Tensor, double, Generator>);
  m.def("draws_as_torch", [] {
    operation::DrawsAsTorch* const asked = operations_on(host.type())->draws_as_torch;
    return asked && asked();
  });
}

}  // namespace fastmlp

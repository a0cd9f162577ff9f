// A frozen model that is a graph: several networks, and elementwise operations and norms between them. Made by
// csrc/python/frozen_load_graph.cpp of what fastmlp/frozen_graph.py has read of the model; called by
// csrc/python/frozen_graph_call.cpp. Knows nothing of Python.
//
// It is described for one row, and runs on tapes (tape.h) of 1, 2, 4, ... rows, which are made of the description when
// they are needed first: a batch goes through them in pieces. Every step gives a row the same bits in all tapes, so
// those of a result depend on nothing but the row. A tape runs on one thread at a time, so each piece takes one that
// nobody runs, and makes another one where there is none.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "../tensors/frozen_network.h"
#include "elementwise_node.h"
#include "tape.h"

namespace fastmlp {

// What a graph is, for one row.
struct GraphForm {
  // Rows of so many elements. Inputs come first, then outputs; a constant is the same for all rows.
  struct Memory {
    enum Kind { input, output, arena, constant } kind;
    int64_t features;
    at::Tensor value = {};  // of a constant, [features] without gaps
  };
  // Elements of each row of a memory: `step` apart, from `offset` on. row_step is that of the memory's rows, or 0.
  struct Place {
    int memory;
    int64_t offset, features, row_step, step;
  };
  struct NetworkStep {
    int network;
    Place from, to;
  };
  struct ElementStep {
    std::vector<Place> inputs;
    std::vector<ElementwiseNode::Instruction> instructions;
    std::vector<std::pair<Place, int>> outputs;  // with the register of each
  };
  struct NormStep {
    Place from;
    std::optional<Place> weight, bias;
    double eps;
    Place to, mean, rstd;
  };
  struct SoftmaxStep {
    Place from, to;
    bool log;
  };
  using Step = std::variant<NetworkStep, ElementStep, NormStep, SoftmaxStep>;

  std::vector<Memory> memories;
  std::vector<Step> steps;
  std::vector<bool> squeezed;  // of each output, whether it has no dimension of features
};

class FrozenGraph {
 public:
  // Raises ValueError for a form that makes no graph. The networks are of one dtype, in the memory of the host.
  FrozenGraph(GraphForm form, std::vector<std::shared_ptr<FrozenNetwork>> networks);

  const GraphForm& form() const { return form_; }
  const std::vector<std::shared_ptr<FrozenNetwork>>& networks() const { return networks_; }
  // The features of each.
  const std::vector<int64_t>& inputs() const { return inputs_; }
  const std::vector<int64_t>& outputs() const { return outputs_; }
  int64_t bytes() const { return bytes_; }                 // of weights, biases and constants
  double multiply_adds() const { return multiply_adds_; }  // of one row

  // Inputs have as many rows each, of their features; outputs are gapless. Any number of threads may call it.
  void run(c10::ArrayRef<StridedView> inputs, c10::ArrayRef<void*> outputs) const;
  // The same for the instruction set that is chosen now; null if this is it.
  std::shared_ptr<FrozenGraph> renewed() const;

 private:
  static constexpr int sizes = 8;  // of tapes: 1, 2, 4, ... rows
  static constexpr int64_t most_rows = int64_t(1) << (sizes - 1);

  struct Pool {
    std::mutex mutex;
    std::vector<std::unique_ptr<Tape>> free;
  };
  struct Batch {
    std::vector<const char*> inputs;
    c10::ArrayRef<void*> outputs;
  };

  void check() const;
  void check(const GraphForm::Place& place) const;
  std::unique_ptr<Tape> made(int64_t rows) const;
  void run_piece(const Batch& batch, int64_t begin, int size) const;

  const GraphForm form_;
  const std::vector<std::shared_ptr<FrozenNetwork>> networks_;
  std::vector<int64_t> inputs_, outputs_;
  at::ScalarType dtype_;
  int64_t bytes_ = 0;
  double multiply_adds_ = 0;
  mutable std::array<Pool, sizes> pools_;
};

}  // namespace fastmlp

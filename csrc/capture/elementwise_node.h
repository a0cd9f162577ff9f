// A step of a tape that is a run of elementwise operations, as contract/elementwise.h describes them. Made in
// csrc/python/capture_nodes.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "../contract/elementwise.h"
#include "node.h"

namespace fastmlp {

class ElementwiseNode final : public Node {
 public:
  struct Instruction {
    std::string operation;
    std::vector<int> operands;  // registers
    std::vector<double> scalars;
  };
  struct Output {
    at::Tensor tensor;
    int source;       // a register
    std::string end;  // "store", "sum", "max" or "min"
    double scale;
  };

  // All tensors have the sizes of the space. Raises ValueError or TypeError for what makes no program.
  ElementwiseNode(const std::vector<at::Tensor>& inputs, const std::vector<Instruction>& instructions,
                  const std::vector<Output>& outputs);

  void run() override { run_->run(memory_.data()); }
  const char* name() const override { return "elementwise"; }

 private:
  std::vector<void*> memory_;  // of inputs, then outputs
  std::unique_ptr<ElementwiseRun> run_;
};

}  // namespace fastmlp

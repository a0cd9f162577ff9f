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

  // The tensors' memory is there, and that of outputs is nobody else's: no copy on writing waits.
  void run() override;
  const char* name() const override { return "elementwise"; }

 private:
  std::vector<at::Tensor> tensors_;  // inputs, then outputs
  std::vector<int64_t> offsets_;     // of these in their storages, in bytes
  std::vector<void*> memory_;
  std::unique_ptr<ElementwiseRun> run_;
};

}  // namespace fastmlp

// Nodes that read or write elements by their numbers, or find such numbers. Made in csrc/python/capture_nodes.cpp.
// Their constructors raise an error for tensors that the kernels cannot take, and their runs, before anything is
// written, the error that torch's operator raises for an index out of range.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "../contract/indices.h"
#include "node.h"

namespace fastmlp {

// The operation returns the first index out of range, or null.
template <class Pass> using CheckedNode = PassNode<Pass, const int64_t*>;

class GatherNode final : public CheckedNode<GatherPass> {
 public:
  // input: [rows, columns]; index, output: [rows, picks].
  GatherNode(const at::Tensor& input, const at::Tensor& index, const at::Tensor& output);
  void run() override;
  const char* name() const override { return "gather"; }
};

class ScatterNode final : public CheckedNode<ScatterPass> {
 public:
  // before, output: [rows, columns]; index, source: [rows, picks]. Without `before`, zeros stand for it.
  ScatterNode(const std::optional<at::Tensor>& before, const at::Tensor& index, const at::Tensor& source,
              const at::Tensor& output, bool adds);
  void run() override;
  const char* name() const override { return pass_.adds ? "scatter_add" : "scatter"; }
};

class RowMaxNode final : public PassNode<RowMaxPass> {
 public:
  // input: [rows, columns]; values, indices: [rows, 1], or none where not asked for.
  RowMaxNode(const at::Tensor& input, const std::optional<at::Tensor>& values,
             const std::optional<at::Tensor>& indices);
  const char* name() const override { return has_values_ ? "max" : "argmax"; }

 private:
  bool has_values_;
};

class TakeRowsNode final : public CheckedNode<TakeRowsPass> {
 public:
  // table: [rows, columns]; index: [picks, 1]; output: [picks, columns]. `operation` is torch's operator, for errors.
  TakeRowsNode(const at::Tensor& table, const at::Tensor& index, const at::Tensor& output, std::string operation);
  void run() override;
  const char* name() const override { return name_.c_str(); }

 private:
  const std::string name_;
};

class AddRowsNode final : public PassNode<AddRowsPass> {
 public:
  // source: [picks, columns]; index: [picks, 1]; output: [rows, columns].
  AddRowsNode(const at::Tensor& source, const at::Tensor& index, int64_t skipped, const at::Tensor& output);
  const char* name() const override { return "embedding_backward"; }
};

class NllNode final : public CheckedNode<NllPass> {
 public:
  // input: [rows, columns]; target: [rows, 1]; loss, total: [].
  NllNode(const at::Tensor& input, const at::Tensor& target, int64_t ignored, bool mean, const at::Tensor& loss,
          const at::Tensor& total);
  void run() override;
  const char* name() const override { return "nll_loss"; }
};

class NllBackwardNode final : public CheckedNode<NllBackwardPass> {
 public:
  // grad, total: []; target: [rows, 1]; grad_input: [rows, columns].
  NllBackwardNode(const at::Tensor& grad, const at::Tensor& target, const at::Tensor& total, int64_t ignored, bool mean,
                  const at::Tensor& grad_input);
  void run() override;
  const char* name() const override { return "nll_loss_backward"; }
};

}  // namespace fastmlp

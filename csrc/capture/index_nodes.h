// Nodes that read or write elements by their numbers, or find such numbers. Made in csrc/python/capture_nodes.cpp.
// Their constructors raise an error for tensors that the kernels cannot take, and their runs, before anything is
// written, the error that torch's operator raises for an index out of range.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "../tensors/devices.h"
#include "node.h"

namespace fastmlp {

class GatherNode final : public Node {
 public:
  // input: [rows, columns]; index, output: [rows, picks].
  GatherNode(at::Tensor input, at::Tensor index, at::Tensor output);
  void run() override;
  const char* name() const override { return "gather"; }

 private:
  const at::Tensor input_, index_, output_;
  GatherPass shape_;
  operation::Gather* pass_;
};

class ScatterNode final : public Node {
 public:
  // before, output: [rows, columns]; index, source: [rows, picks]. Without `before`, zeros stand for it.
  ScatterNode(std::optional<at::Tensor> before, at::Tensor index, at::Tensor source, at::Tensor output, bool adds);
  void run() override;
  const char* name() const override { return shape_.adds ? "scatter_add" : "scatter"; }

 private:
  const std::optional<at::Tensor> before_;
  const at::Tensor index_, source_, output_;
  ScatterPass shape_;
  operation::Scatter* pass_;
};

class RowMaxNode final : public Node {
 public:
  // input: [rows, columns]; values, indices: [rows, 1], or none where not asked for.
  RowMaxNode(at::Tensor input, std::optional<at::Tensor> values, std::optional<at::Tensor> indices);
  void run() override;
  const char* name() const override { return values_ ? "max" : "argmax"; }

 private:
  const at::Tensor input_;
  const std::optional<at::Tensor> values_, indices_;
  RowMaxPass shape_;
  operation::RowMax* pass_;
};

class TakeRowsNode final : public Node {
 public:
  // table: [rows, columns]; index: [picks, 1]; output: [picks, columns]. `operation` is torch's operator, for errors.
  TakeRowsNode(at::Tensor table, at::Tensor index, at::Tensor output, std::string operation);
  void run() override;
  const char* name() const override { return operation_.c_str(); }

 private:
  const at::Tensor table_, index_, output_;
  const std::string operation_;
  TakeRowsPass shape_;
  operation::TakeRows* pass_;
};

class AddRowsNode final : public Node {
 public:
  // source: [picks, columns]; index: [picks, 1]; output: [rows, columns].
  AddRowsNode(at::Tensor source, at::Tensor index, int64_t skipped, at::Tensor output);
  void run() override;
  const char* name() const override { return "embedding_backward"; }

 private:
  const at::Tensor source_, index_, output_;
  AddRowsPass shape_;
  operation::AddRows* pass_;
};

class NllNode final : public Node {
 public:
  // input: [rows, columns]; target: [rows, 1]; loss, total: [].
  NllNode(at::Tensor input, at::Tensor target, int64_t ignored, bool mean, at::Tensor loss, at::Tensor total);
  void run() override;
  const char* name() const override { return "nll_loss"; }

 private:
  const at::Tensor input_, target_, loss_, total_;
  NllPass shape_;
  operation::Nll* pass_;
};

class NllBackwardNode final : public Node {
 public:
  // grad, total: []; target: [rows, 1]; grad_input: [rows, columns].
  NllBackwardNode(at::Tensor grad, at::Tensor target, at::Tensor total, int64_t ignored, bool mean,
                  at::Tensor grad_input);
  void run() override;
  const char* name() const override { return "nll_loss_backward"; }

 private:
  const at::Tensor grad_, target_, total_, grad_input_;
  NllBackwardPass shape_;
  operation::NllBackward* pass_;
};

}  // namespace fastmlp

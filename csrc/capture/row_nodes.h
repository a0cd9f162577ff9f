// Nodes that pass over the rows of matrices: layer normalisation, batch normalisation, softmax and their gradients.
// Made in csrc/python/capture_nodes.cpp. Their constructors raise an error for tensors that the kernels cannot take.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../tensors/devices.h"
#include "node.h"

namespace fastmlp {

class LayerNormNode final : public Node {
 public:
  // input, output: [rows, columns]; weight, bias: [columns] or none; mean, rstd: [rows], written.
  LayerNormNode(at::Tensor input, std::optional<at::Tensor> weight, std::optional<at::Tensor> bias, double eps,
                at::Tensor output, at::Tensor mean, at::Tensor rstd);
  void run() override;
  const char* name() const override { return "layer_norm"; }

 private:
  const at::Tensor input_;
  const std::optional<at::Tensor> weight_, bias_;
  const double eps_;
  const at::Tensor output_, mean_, rstd_;
  operation::LayerNorm* pass_;
};

class LayerNormBackwardNode final : public Node {
 public:
  // As of LayerNormNode; a gradient that is none is not computed.
  LayerNormBackwardNode(at::Tensor grad, at::Tensor input, at::Tensor mean, at::Tensor rstd,
                        std::optional<at::Tensor> weight, std::optional<at::Tensor> grad_input,
                        std::optional<at::Tensor> grad_weight, std::optional<at::Tensor> grad_bias);
  void run() override;
  const char* name() const override { return "layer_norm_backward"; }

 private:
  const at::Tensor grad_, input_, mean_, rstd_;
  const std::optional<at::Tensor> weight_, grad_input_, grad_weight_, grad_bias_;
  operation::LayerNormBackward* pass_;
};

class BatchNormNode final : public Node {
 public:
  // input, output: [rows, columns], a row at least; all others [columns]. What is none is not there, or not computed.
  // The running statistics are read, or in training read and written; mean, rstd: of the batch, written in training.
  BatchNormNode(at::Tensor input, std::optional<at::Tensor> weight, std::optional<at::Tensor> bias,
                std::optional<at::Tensor> running_mean, std::optional<at::Tensor> running_variance, bool training,
                double momentum, double eps, std::optional<at::Tensor> output, std::optional<at::Tensor> mean,
                std::optional<at::Tensor> rstd);
  void run() override;
  const char* name() const override { return "batch_norm"; }

 private:
  const at::Tensor input_;
  const std::optional<at::Tensor> weight_, bias_, running_mean_, running_variance_;
  const bool training_;
  const double momentum_, eps_;
  const std::optional<at::Tensor> output_, mean_, rstd_;
  operation::BatchNorm* pass_;
};

class BatchNormBackwardNode final : public Node {
 public:
  // As of BatchNormNode. Either rstd, which training made of the batch, or running_variance, which the input did not
  // take part in; `mean` is the one that belongs to it. A gradient that is none is not computed.
  BatchNormBackwardNode(at::Tensor grad, at::Tensor input, at::Tensor mean, std::optional<at::Tensor> rstd,
                        std::optional<at::Tensor> running_variance, double eps, std::optional<at::Tensor> weight,
                        std::optional<at::Tensor> grad_input, std::optional<at::Tensor> grad_weight,
                        std::optional<at::Tensor> grad_bias);
  void run() override;
  const char* name() const override { return "batch_norm_backward"; }

 private:
  const at::Tensor grad_, input_, mean_;
  const std::optional<at::Tensor> rstd_, running_variance_;
  const double eps_;
  const std::optional<at::Tensor> weight_, grad_input_, grad_weight_, grad_bias_;
  operation::BatchNormBackward* pass_;
};

class SoftmaxNode final : public Node {
 public:
  // [rows, columns] each.
  SoftmaxNode(at::Tensor input, at::Tensor output, bool log);
  void run() override;
  const char* name() const override { return log_ ? "log_softmax" : "softmax"; }

 private:
  const at::Tensor input_, output_;
  const bool log_;
  operation::Softmax* pass_;
};

class SoftmaxBackwardNode final : public Node {
 public:
  // [rows, columns] each; grad_input may be grad or output.
  SoftmaxBackwardNode(at::Tensor grad, at::Tensor output, at::Tensor grad_input, bool log);
  void run() override;
  const char* name() const override { return log_ ? "log_softmax_backward" : "softmax_backward"; }

 private:
  const at::Tensor grad_, output_, grad_input_;
  const bool log_;
  operation::SoftmaxBackward* pass_;
};

}  // namespace fastmlp

// Nodes that pass over the rows of matrices: layer normalisation, batch normalisation, softmax and their gradients.
// Made in csrc/python/capture_nodes.cpp. Their constructors raise an error for tensors that the kernels cannot take.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../contract/rows.h"
#include "node.h"

namespace fastmlp {

class LayerNormNode final : public PassNode<LayerNormPass> {
 public:
  // input, output: [rows, columns]; weight, bias: [columns] or none; mean, rstd: [rows], written.
  LayerNormNode(const at::Tensor& input, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                double eps, const at::Tensor& output, const at::Tensor& mean, const at::Tensor& rstd);
  const char* name() const override { return "layer_norm"; }
};

class LayerNormBackwardNode final : public PassNode<LayerNormBackwardPass> {
 public:
  // As of LayerNormNode; a gradient that is none is not computed.
  LayerNormBackwardNode(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& mean, const at::Tensor& rstd,
                        const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& grad_input,
                        const std::optional<at::Tensor>& grad_weight, const std::optional<at::Tensor>& grad_bias);
  const char* name() const override { return "layer_norm_backward"; }
};

class BatchNormNode final : public PassNode<BatchNormPass> {
 public:
  // input, output: [rows, columns], a row at least; all others [columns]. What is none is not there, or not computed.
  // The running statistics are read, or in training read and written; mean, rstd: of the batch, written in training.
  BatchNormNode(const at::Tensor& input, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_variance,
                bool training, double momentum, double eps, const std::optional<at::Tensor>& output,
                const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& rstd);
  const char* name() const override { return "batch_norm"; }
};

class BatchNormBackwardNode final : public PassNode<BatchNormBackwardPass> {
 public:
  // As of BatchNormNode. Either rstd, which training made of the batch, or running_variance, which the input did not
  // take part in; `mean` is the one that belongs to it. A gradient that is none is not computed.
  BatchNormBackwardNode(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& mean,
                        const std::optional<at::Tensor>& rstd, const std::optional<at::Tensor>& running_variance,
                        double eps, const std::optional<at::Tensor>& weight,
                        const std::optional<at::Tensor>& grad_input, const std::optional<at::Tensor>& grad_weight,
                        const std::optional<at::Tensor>& grad_bias);
  const char* name() const override { return "batch_norm_backward"; }
};

class SoftmaxNode final : public PassNode<SoftmaxPass> {
 public:
  // [rows, columns] each.
  SoftmaxNode(const at::Tensor& input, const at::Tensor& output, bool log);
  const char* name() const override { return pass_.log ? "log_softmax" : "softmax"; }
};

class SoftmaxBackwardNode final : public PassNode<SoftmaxBackwardPass> {
 public:
  // [rows, columns] each; grad_input may be grad or output.
  SoftmaxBackwardNode(const at::Tensor& grad, const at::Tensor& output, const at::Tensor& grad_input, bool log);
  const char* name() const override { return pass_.log ? "log_softmax_backward" : "softmax_backward"; }
};

}  // namespace fastmlp

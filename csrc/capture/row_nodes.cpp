// Checks what nodes of rows are made of, and describes it to the device.
#include "row_nodes.h"

#include "../tensors/devices.h"
#include "../tensors/dtypes.h"
#include "checks.h"

namespace fastmlp {
namespace {

void check(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, const at::Tensor& like) {
  check_like(tensor, name, sizes, like);
  check_gapless(tensor, name);
}

void check(const std::optional<at::Tensor>& tensor, const char* name, at::IntArrayRef sizes, const at::Tensor& like) {
  if (tensor) check(*tensor, name, sizes, like);
}

void check_matrix(const at::Tensor& tensor, const char* name) {
  check_numbers(tensor, name);
  check_gapless(tensor, name);
}

void check_batch(const at::Tensor& tensor, const char* name) {
  check_matrix(tensor, name);
  TORCH_CHECK_VALUE(tensor.size(0) > 0, "fastmlp: ", name, " is ", tensor.sizes(), ", expected a row at least");
}

void check_softmax(const at::Tensor& tensor, const char* name) {
  check_matrix(tensor, name);
  TORCH_CHECK_VALUE(tensor.size(1) <= most_softmax_columns, "fastmlp: ", name, " has ", tensor.size(1),
                    " columns, expected at most ", most_softmax_columns, "; call torch's operator for wider ones");
}

RowsShape shape_of(const at::Tensor& matrix) {
  return {*dtype_of(matrix.scalar_type()), matrix.size(0), matrix.size(1)};
}

}  // namespace

LayerNormNode::LayerNormNode(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& bias, double eps, const at::Tensor& output,
                             const at::Tensor& mean, const at::Tensor& rstd) {
  check_matrix(input, "input");
  const at::IntArrayRef rows = input.sizes().slice(0, 1), columns = input.sizes().slice(1);
  check(weight, "weight", columns, input);
  check(bias, "bias", columns, input);
  check(output, "output", input.sizes(), input);
  check(mean, "mean", rows, input);
  check(rstd, "rstd", rows, input);
  operation_ = known(operations_for(input).layer_norm, input, "layer normalisation");
  pass_.shape = shape_of(input);
  pass_.eps = eps;
  keep(input, pass_.input);
  keep(weight, pass_.weight);
  keep(bias, pass_.bias);
  keep(output, pass_.output);
  keep(mean, pass_.mean);
  keep(rstd, pass_.rstd);
}

LayerNormBackwardNode::LayerNormBackwardNode(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& mean,
                                             const at::Tensor& rstd, const std::optional<at::Tensor>& weight,
                                             const std::optional<at::Tensor>& grad_input,
                                             const std::optional<at::Tensor>& grad_weight,
                                             const std::optional<at::Tensor>& grad_bias) {
  check_matrix(grad, "grad");
  const at::IntArrayRef rows = grad.sizes().slice(0, 1), columns = grad.sizes().slice(1);
  check(input, "input", grad.sizes(), grad);
  check(mean, "mean", rows, grad);
  check(rstd, "rstd", rows, grad);
  check(weight, "weight", columns, grad);
  check(grad_input, "grad_input", grad.sizes(), grad);
  check(grad_weight, "grad_weight", columns, grad);
  check(grad_bias, "grad_bias", columns, grad);
  operation_ = known(operations_for(grad).layer_norm_backward, grad, "layer normalisation");
  pass_.shape = shape_of(grad);
  keep(grad, pass_.grad);
  keep(input, pass_.input);
  keep(mean, pass_.mean);
  keep(rstd, pass_.rstd);
  keep(weight, pass_.weight);
  keep(grad_input, pass_.grad_input);
  keep(grad_weight, pass_.grad_weight);
  keep(grad_bias, pass_.grad_bias);
}

BatchNormNode::BatchNormNode(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                             const std::optional<at::Tensor>& running_variance, bool training, double momentum,
                             double eps, const std::optional<at::Tensor>& output, const std::optional<at::Tensor>& mean,
                             const std::optional<at::Tensor>& rstd) {
  check_batch(input, "input");
  const at::IntArrayRef columns = input.sizes().slice(1);
  check(weight, "weight", columns, input);
  check(bias, "bias", columns, input);
  check(running_mean, "running_mean", columns, input);
  check(running_variance, "running_variance", columns, input);
  check(output, "output", input.sizes(), input);
  check(mean, "mean", columns, input);
  check(rstd, "rstd", columns, input);
  TORCH_CHECK_VALUE(training || (running_mean && running_variance),
                    "fastmlp: running_mean or running_variance is missing, expected both where training is false");
  operation_ = known(operations_for(input).batch_norm, input, "batch normalisation");
  pass_.shape = shape_of(input);
  pass_.training = training;
  pass_.momentum = momentum;
  pass_.eps = eps;
  keep(input, pass_.input);
  keep(weight, pass_.weight);
  keep(bias, pass_.bias);
  keep(running_mean, pass_.running_mean);
  keep(running_variance, pass_.running_variance);
  keep(output, pass_.output);
  keep(mean, pass_.mean);
  keep(rstd, pass_.rstd);
}

BatchNormBackwardNode::BatchNormBackwardNode(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& mean,
                                             const std::optional<at::Tensor>& rstd,
                                             const std::optional<at::Tensor>& running_variance, double eps,
                                             const std::optional<at::Tensor>& weight,
                                             const std::optional<at::Tensor>& grad_input,
                                             const std::optional<at::Tensor>& grad_weight,
                                             const std::optional<at::Tensor>& grad_bias) {
  check_batch(grad, "grad");
  const at::IntArrayRef columns = grad.sizes().slice(1);
  check(input, "input", grad.sizes(), grad);
  check(mean, "mean", columns, grad);
  check(rstd, "rstd", columns, grad);
  check(running_variance, "running_variance", columns, grad);
  check(weight, "weight", columns, grad);
  check(grad_input, "grad_input", grad.sizes(), grad);
  check(grad_weight, "grad_weight", columns, grad);
  check(grad_bias, "grad_bias", columns, grad);
  TORCH_CHECK_VALUE(rstd.has_value() != running_variance.has_value(), "fastmlp: rstd and running_variance are ",
                    rstd ? "both given" : "both missing", ", expected one of them");
  operation_ = known(operations_for(grad).batch_norm_backward, grad, "batch normalisation");
  pass_.shape = shape_of(grad);
  pass_.eps = eps;
  keep(grad, pass_.grad);
  keep(input, pass_.input);
  keep(mean, pass_.mean);
  keep(rstd, pass_.rstd);
  keep(running_variance, pass_.running_variance);
  keep(weight, pass_.weight);
  keep(grad_input, pass_.grad_input);
  keep(grad_weight, pass_.grad_weight);
  keep(grad_bias, pass_.grad_bias);
}

SoftmaxNode::SoftmaxNode(const at::Tensor& input, const at::Tensor& output, bool log) {
  check_softmax(input, "input");
  check(output, "output", input.sizes(), input);
  operation_ = known(operations_for(input).softmax, input, "softmax");
  pass_.shape = shape_of(input);
  pass_.log = log;
  keep(input, pass_.input);
  keep(output, pass_.output);
}

SoftmaxBackwardNode::SoftmaxBackwardNode(const at::Tensor& grad, const at::Tensor& output, const at::Tensor& grad_input,
                                         bool log) {
  check_softmax(grad, "grad");
  check(output, "output", grad.sizes(), grad);
  check(grad_input, "grad_input", grad.sizes(), grad);
  operation_ = known(operations_for(grad).softmax_backward, grad, "softmax");
  pass_.shape = shape_of(grad);
  pass_.log = log;
  keep(grad, pass_.grad);
  keep(output, pass_.output);
  keep(grad_input, pass_.grad_input);
}

}  // namespace fastmlp

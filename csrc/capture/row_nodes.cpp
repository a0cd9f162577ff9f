// Checks what nodes of rows are made of, and describes it to the device.
#include "row_nodes.h"

#include "../tensors/devices.h"
#include "../tensors/dtypes.h"
#include "checks.h"

namespace fastmlp {
namespace {

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
  keep(input, pass_.input);
  const at::IntArrayRef rows = input.sizes().slice(0, 1), columns = input.sizes().slice(1);
  take(weight, "weight", columns, input, pass_.weight);
  take(bias, "bias", columns, input, pass_.bias);
  take(output, "output", input.sizes(), input, pass_.output);
  take(mean, "mean", rows, input, pass_.mean);
  take(rstd, "rstd", rows, input, pass_.rstd);
  operation_ = known(operations_for(input).layer_norm, input, "layer normalisation");
  pass_.shape = shape_of(input);
  pass_.eps = eps;
}

LayerNormBackwardNode::LayerNormBackwardNode(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& mean,
                                             const at::Tensor& rstd, const std::optional<at::Tensor>& weight,
                                             const std::optional<at::Tensor>& grad_input,
                                             const std::optional<at::Tensor>& grad_weight,
                                             const std::optional<at::Tensor>& grad_bias) {
  check_matrix(grad, "grad");
  keep(grad, pass_.grad);
  const at::IntArrayRef rows = grad.sizes().slice(0, 1), columns = grad.sizes().slice(1);
  take(input, "input", grad.sizes(), grad, pass_.input);
  take(mean, "mean", rows, grad, pass_.mean);
  take(rstd, "rstd", rows, grad, pass_.rstd);
  take(weight, "weight", columns, grad, pass_.weight);
  take(grad_input, "grad_input", grad.sizes(), grad, pass_.grad_input);
  take(grad_weight, "grad_weight", columns, grad, pass_.grad_weight);
  take(grad_bias, "grad_bias", columns, grad, pass_.grad_bias);
  operation_ = known(operations_for(grad).layer_norm_backward, grad, "layer normalisation");
  pass_.shape = shape_of(grad);
}

BatchNormNode::BatchNormNode(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                             const std::optional<at::Tensor>& running_variance, bool training, double momentum,
                             double eps, const std::optional<at::Tensor>& output, const std::optional<at::Tensor>& mean,
                             const std::optional<at::Tensor>& rstd) {
  check_batch(input, "input");
  keep(input, pass_.input);
  const at::IntArrayRef columns = input.sizes().slice(1);
  take(weight, "weight", columns, input, pass_.weight);
  take(bias, "bias", columns, input, pass_.bias);
  take(running_mean, "running_mean", columns, input, pass_.running_mean);
  take(running_variance, "running_variance", columns, input, pass_.running_variance);
  take(output, "output", input.sizes(), input, pass_.output);
  take(mean, "mean", columns, input, pass_.mean);
  take(rstd, "rstd", columns, input, pass_.rstd);
  TORCH_CHECK_VALUE(training || (running_mean && running_variance),
                    "fastmlp: running_mean or running_variance is missing, expected both where training is false");
  operation_ = known(operations_for(input).batch_norm, input, "batch normalisation");
  pass_.shape = shape_of(input);
  pass_.training = training;
  pass_.momentum = momentum;
  pass_.eps = eps;
}

BatchNormBackwardNode::BatchNormBackwardNode(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& mean,
                                             const std::optional<at::Tensor>& rstd,
                                             const std::optional<at::Tensor>& running_variance, double eps,
                                             const std::optional<at::Tensor>& weight,
                                             const std::optional<at::Tensor>& grad_input,
                                             const std::optional<at::Tensor>& grad_weight,
                                             const std::optional<at::Tensor>& grad_bias) {
  check_batch(grad, "grad");
  keep(grad, pass_.grad);
  const at::IntArrayRef columns = grad.sizes().slice(1);
  take(input, "input", grad.sizes(), grad, pass_.input);
  take(mean, "mean", columns, grad, pass_.mean);
  take(rstd, "rstd", columns, grad, pass_.rstd);
  take(running_variance, "running_variance", columns, grad, pass_.running_variance);
  take(weight, "weight", columns, grad, pass_.weight);
  take(grad_input, "grad_input", grad.sizes(), grad, pass_.grad_input);
  take(grad_weight, "grad_weight", columns, grad, pass_.grad_weight);
  take(grad_bias, "grad_bias", columns, grad, pass_.grad_bias);
  TORCH_CHECK_VALUE(rstd.has_value() != running_variance.has_value(), "fastmlp: rstd and running_variance are ",
                    rstd ? "both given" : "both missing", ", expected one of them");
  operation_ = known(operations_for(grad).batch_norm_backward, grad, "batch normalisation");
  pass_.shape = shape_of(grad);
  pass_.eps = eps;
}

SoftmaxNode::SoftmaxNode(const at::Tensor& input, const at::Tensor& output, bool log) {
  check_softmax(input, "input");
  keep(input, pass_.input);
  take(output, "output", input.sizes(), input, pass_.output);
  operation_ = known(operations_for(input).softmax, input, "softmax");
  pass_.shape = shape_of(input);
  pass_.log = log;
}

SoftmaxBackwardNode::SoftmaxBackwardNode(const at::Tensor& grad, const at::Tensor& output, const at::Tensor& grad_input,
                                         bool log) {
  check_softmax(grad, "grad");
  keep(grad, pass_.grad);
  take(output, "output", grad.sizes(), grad, pass_.output);
  take(grad_input, "grad_input", grad.sizes(), grad, pass_.grad_input);
  operation_ = known(operations_for(grad).softmax_backward, grad, "softmax");
  pass_.shape = shape_of(grad);
  pass_.log = log;
}

}  // namespace fastmlp

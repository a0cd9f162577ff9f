// Checks what nodes of rows are made of, and turns their tensors into pointers at each run.
#include "row_nodes.h"

#include <utility>

#include "../tensors/dtypes.h"

namespace fastmlp {
namespace {

void check(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, const at::Tensor& like) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), "fastmlp: ", name, " is of ", tensor.scalar_type(),
                   ", expected ", like.scalar_type(), ", as the first tensor is");
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, "fastmlp: ", name, " is ", tensor.sizes(), ", expected ", sizes);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), "fastmlp: ", name,
                    " has gaps in memory, expected none; make it contiguous");
  TORCH_CHECK_VALUE(tensor.device() == like.device(), "fastmlp: ", name, " is on ", tensor.device(), ", expected ",
                    like.device(), ", as the first tensor is");
}

void check(const std::optional<at::Tensor>& tensor, const char* name, at::IntArrayRef sizes, const at::Tensor& like) {
  if (tensor) check(*tensor, name, sizes, like);
}

void check_matrix(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, "fastmlp: ", name,
                   " is of ", tensor.scalar_type(), ", expected float32 or float64");
  TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.size(1) > 0, "fastmlp: ", name, " is ", tensor.sizes(),
                    ", expected [rows, columns] with a column at least");
  check(tensor, name, tensor.sizes(), tensor);
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

template <class Operation> Operation* known(Operation* operation, const at::Tensor& tensor, const char* what) {
  TORCH_CHECK(operation, "fastmlp: there is no kernel of ", what, " for ", tensor.device());
  return operation;
}

void* pointer(const std::optional<at::Tensor>& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

}  // namespace

LayerNormNode::LayerNormNode(at::Tensor input, std::optional<at::Tensor> weight, std::optional<at::Tensor> bias,
                             double eps, at::Tensor output, at::Tensor mean, at::Tensor rstd)
    : input_(std::move(input)),
      weight_(std::move(weight)),
      bias_(std::move(bias)),
      eps_(eps),
      output_(std::move(output)),
      mean_(std::move(mean)),
      rstd_(std::move(rstd)) {
  check_matrix(input_, "input");
  const at::IntArrayRef rows = input_.sizes().slice(0, 1), columns = input_.sizes().slice(1);
  check(weight_, "weight", columns, input_);
  check(bias_, "bias", columns, input_);
  check(output_, "output", input_.sizes(), input_);
  check(mean_, "mean", rows, input_);
  check(rstd_, "rstd", rows, input_);
  pass_ = known(operations_for(input_).layer_norm, input_, "layer normalisation");
}

void LayerNormNode::run() {
  pass_({shape_of(input_), input_.data_ptr(), pointer(weight_), pointer(bias_), eps_, output_.data_ptr(),
         mean_.data_ptr(), rstd_.data_ptr()});
}

LayerNormBackwardNode::LayerNormBackwardNode(at::Tensor grad, at::Tensor input, at::Tensor mean, at::Tensor rstd,
                                             std::optional<at::Tensor> weight, std::optional<at::Tensor> grad_input,
                                             std::optional<at::Tensor> grad_weight, std::optional<at::Tensor> grad_bias)
    : grad_(std::move(grad)),
      input_(std::move(input)),
      mean_(std::move(mean)),
      rstd_(std::move(rstd)),
      weight_(std::move(weight)),
      grad_input_(std::move(grad_input)),
      grad_weight_(std::move(grad_weight)),
      grad_bias_(std::move(grad_bias)) {
  check_matrix(grad_, "grad");
  const at::IntArrayRef rows = grad_.sizes().slice(0, 1), columns = grad_.sizes().slice(1);
  check(input_, "input", grad_.sizes(), grad_);
  check(mean_, "mean", rows, grad_);
  check(rstd_, "rstd", rows, grad_);
  check(weight_, "weight", columns, grad_);
  check(grad_input_, "grad_input", grad_.sizes(), grad_);
  check(grad_weight_, "grad_weight", columns, grad_);
  check(grad_bias_, "grad_bias", columns, grad_);
  pass_ = known(operations_for(grad_).layer_norm_backward, grad_, "layer normalisation");
}

void LayerNormBackwardNode::run() {
  pass_({shape_of(grad_), grad_.data_ptr(), input_.data_ptr(), mean_.data_ptr(), rstd_.data_ptr(), pointer(weight_),
         pointer(grad_input_), pointer(grad_weight_), pointer(grad_bias_)});
}

BatchNormNode::BatchNormNode(at::Tensor input, std::optional<at::Tensor> weight, std::optional<at::Tensor> bias,
                             std::optional<at::Tensor> running_mean, std::optional<at::Tensor> running_variance,
                             bool training, double momentum, double eps, std::optional<at::Tensor> output,
                             std::optional<at::Tensor> mean, std::optional<at::Tensor> rstd)
    : input_(std::move(input)),
      weight_(std::move(weight)),
      bias_(std::move(bias)),
      running_mean_(std::move(running_mean)),
      running_variance_(std::move(running_variance)),
      training_(training),
      momentum_(momentum),
      eps_(eps),
      output_(std::move(output)),
      mean_(std::move(mean)),
      rstd_(std::move(rstd)) {
  check_batch(input_, "input");
  const at::IntArrayRef columns = input_.sizes().slice(1);
  check(weight_, "weight", columns, input_);
  check(bias_, "bias", columns, input_);
  check(running_mean_, "running_mean", columns, input_);
  check(running_variance_, "running_variance", columns, input_);
  check(output_, "output", input_.sizes(), input_);
  check(mean_, "mean", columns, input_);
  check(rstd_, "rstd", columns, input_);
  TORCH_CHECK_VALUE(training_ || (running_mean_ && running_variance_),
                    "fastmlp: running_mean or running_variance is missing, expected both where training is false");
  pass_ = known(operations_for(input_).batch_norm, input_, "batch normalisation");
}

void BatchNormNode::run() {
  pass_({shape_of(input_), training_, input_.data_ptr(), pointer(weight_), pointer(bias_), pointer(running_mean_),
         pointer(running_variance_), momentum_, eps_, pointer(output_), pointer(mean_), pointer(rstd_)});
}

BatchNormBackwardNode::BatchNormBackwardNode(at::Tensor grad, at::Tensor input, at::Tensor mean,
                                             std::optional<at::Tensor> rstd, std::optional<at::Tensor> running_variance,
                                             double eps, std::optional<at::Tensor> weight,
                                             std::optional<at::Tensor> grad_input,
                                             std::optional<at::Tensor> grad_weight, std::optional<at::Tensor> grad_bias)
    : grad_(std::move(grad)),
      input_(std::move(input)),
      mean_(std::move(mean)),
      rstd_(std::move(rstd)),
      running_variance_(std::move(running_variance)),
      eps_(eps),
      weight_(std::move(weight)),
      grad_input_(std::move(grad_input)),
      grad_weight_(std::move(grad_weight)),
      grad_bias_(std::move(grad_bias)) {
  check_batch(grad_, "grad");
  const at::IntArrayRef columns = grad_.sizes().slice(1);
  check(input_, "input", grad_.sizes(), grad_);
  check(mean_, "mean", columns, grad_);
  check(rstd_, "rstd", columns, grad_);
  check(running_variance_, "running_variance", columns, grad_);
  check(weight_, "weight", columns, grad_);
  check(grad_input_, "grad_input", grad_.sizes(), grad_);
  check(grad_weight_, "grad_weight", columns, grad_);
  check(grad_bias_, "grad_bias", columns, grad_);
  TORCH_CHECK_VALUE(rstd_.has_value() != running_variance_.has_value(), "fastmlp: rstd and running_variance are ",
                    rstd_ ? "both given" : "both missing", ", expected one of them");
  pass_ = known(operations_for(grad_).batch_norm_backward, grad_, "batch normalisation");
}

void BatchNormBackwardNode::run() {
  pass_({shape_of(grad_), grad_.data_ptr(), input_.data_ptr(), mean_.data_ptr(), pointer(rstd_),
         pointer(running_variance_), eps_, pointer(weight_), pointer(grad_input_), pointer(grad_weight_),
         pointer(grad_bias_)});
}

SoftmaxNode::SoftmaxNode(at::Tensor input, at::Tensor output, bool log)
    : input_(std::move(input)), output_(std::move(output)), log_(log) {
  check_softmax(input_, "input");
  check(output_, "output", input_.sizes(), input_);
  pass_ = known(operations_for(input_).softmax, input_, "softmax");
}

void SoftmaxNode::run() { pass_({shape_of(input_), log_, input_.data_ptr(), output_.data_ptr()}); }

SoftmaxBackwardNode::SoftmaxBackwardNode(at::Tensor grad, at::Tensor output, at::Tensor grad_input, bool log)
    : grad_(std::move(grad)), output_(std::move(output)), grad_input_(std::move(grad_input)), log_(log) {
  check_softmax(grad_, "grad");
  check(output_, "output", grad_.sizes(), grad_);
  check(grad_input_, "grad_input", grad_.sizes(), grad_);
  pass_ = known(operations_for(grad_).softmax_backward, grad_, "softmax");
}

void SoftmaxBackwardNode::run() {
  pass_({shape_of(grad_), log_, grad_.data_ptr(), output_.data_ptr(), grad_input_.data_ptr()});
}

}  // namespace fastmlp

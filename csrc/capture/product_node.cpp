// The node declared in product_node.h: shapes are read once.
#include "product_node.h"

#include "../tensors/devices.h"
#include "../tensors/dtypes.h"

namespace fastmlp {
namespace {

void check(bool right, const char* what, const ProductTensors& tensors) {
  TORCH_CHECK_VALUE(right, "fastmlp: capture: of the product of a ", tensors.a.sizes(), " and b ", tensors.b.sizes(),
                    " ", what);
}

}  // namespace

ProductNode::ProductNode(const ProductTensors& tensors, const ActivationSpec& activation) {
  const auto& [a, b, bias, output, pre_activation, row_sums] = tensors;
  const std::optional<DType> dtype = dtype_of(a.scalar_type());
  TORCH_CHECK_TYPE(dtype, "fastmlp: capture: a has dtype ", dtype_name(a.scalar_type()),
                   ", expected float32, float64, bfloat16 or float16");
  for (const at::Tensor& other : {b, bias, output, pre_activation, row_sums}) {
    TORCH_CHECK_TYPE(!other.defined() || other.scalar_type() == a.scalar_type(),
                     "fastmlp: capture: the tensors of a product have several dtypes, expected that of a, ",
                     dtype_name(a.scalar_type()));
  }
  check(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "the sizes do not fit", tensors);
  const auto fits = [&](const at::Tensor& made) {
    return made.dim() == 2 && made.size(0) == a.size(0) && made.size(1) == b.size(1) &&
           (made.stride(1) == 1 || made.size(1) == 1);
  };
  check(fits(output), "the output has another shape, or gaps in its rows", tensors);
  // The stride of a single row is never taken.
  const auto lies_like_output = [&] { return a.size(0) == 1 || pre_activation.stride(0) == output.stride(0); };
  check(!pre_activation.defined() || (fits(pre_activation) && lies_like_output()),
        "the pre-activation does not lie as the output does", tensors);
  check(!bias.defined() || (bias.dim() == 1 && bias.size(0) == b.size(1)), "the bias has another size", tensors);
  check(!row_sums.defined() || (row_sums.dim() == 1 && row_sums.size(0) == a.size(0) && row_sums.is_contiguous()),
        "the row sums have another size, or gaps", tensors);
  pass_.dtype = *dtype;
  pass_.m = a.size(0);
  pass_.n = b.size(1);
  pass_.k = a.size(1);
  pass_.a = {nullptr, a.stride(0), a.stride(1)};
  pass_.b = {nullptr, b.stride(0), b.stride(1)};
  if (bias.defined()) pass_.bias.stride = bias.stride(0);
  pass_.row_stride = pass_.m == 1 ? pass_.n : output.stride(0);
  pass_.activation = activation;
  operation_ = operations_for(a).multiply;
  keep(a, pass_.a.data);
  keep(b, pass_.b.data);
  keep(bias, pass_.bias.data);
  keep(output, pass_.output);
  keep(pre_activation, pass_.pre_activation);
  keep(row_sums, pass_.row_sums);
}

}  // namespace fastmlp

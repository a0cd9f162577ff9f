// The node of a matrix product with bias and activation. Made in csrc/python/capture_nodes.cpp. Leaves arithmetic to
// the device.
#pragma once

#include <ATen/core/Tensor.h>

#include "../contract/product.h"
#include "node.h"

namespace fastmlp {

// What does not exist is undefined.
struct ProductTensors {
  at::Tensor a, b, bias, output, pre_activation, row_sums;
};

class ProductNode final : public PassNode<ProductPass> {
 public:
  // Raises TypeError or ValueError for tensors that do not fit together.
  ProductNode(const ProductTensors& tensors, const ActivationSpec& activation);
  const char* name() const override { return "product"; }
};

}  // namespace fastmlp

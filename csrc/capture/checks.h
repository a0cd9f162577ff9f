// What the constructors of nodes ask of their tensors, before a tape has the node. Raise an error that names the
// tensor.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastmlp {

// Of float32 or float64, [rows, columns] with a column at least.
void check_numbers(const at::Tensor& tensor, const char* name);
// Of these sizes, and of the dtype and device of `like`, which is the node's first tensor.
void check_like(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, const at::Tensor& like);
// int64, of these sizes, and on the device of `like`.
void check_index(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, const at::Tensor& like);
// Elements lie one after another.
void check_gapless(const at::Tensor& tensor, const char* name);

// The operation of a device, which has it or not.
template <class Operation> Operation* known(Operation* operation, const at::Tensor& tensor, const char* what) {
  TORCH_CHECK(operation, "fastmlp: there is no kernel of ", what, " for ", tensor.device());
  return operation;
}

}  // namespace fastmlp

// The checks of checks.h.
#include "checks.h"

namespace fastmlp {
namespace {

void check_place(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, const at::Tensor& like) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, "fastmlp: ", name, " is ", tensor.sizes(), ", expected ", sizes);
  TORCH_CHECK_VALUE(tensor.device() == like.device(), "fastmlp: ", name, " is on ", tensor.device(), ", expected ",
                    like.device(), ", as the first tensor is");
}

}  // namespace

void check_numbers(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, "fastmlp: ", name,
                   " is of ", tensor.scalar_type(), ", expected float32 or float64");
  TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.size(1) > 0, "fastmlp: ", name, " is ", tensor.sizes(),
                    ", expected [rows, columns] with a column at least");
}

void check_like(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, const at::Tensor& like) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), "fastmlp: ", name, " is of ", tensor.scalar_type(),
                   ", expected ", like.scalar_type(), ", as the first tensor is");
  check_place(tensor, name, sizes, like);
}

void check_index(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, const at::Tensor& like) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong, "fastmlp: ", name, " is of ", tensor.scalar_type(),
                   ", expected int64; call .long() on it");
  check_place(tensor, name, sizes, like);
}

void check_gapless(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.is_contiguous(), "fastmlp: ", name,
                    " has gaps in memory, expected none; make it contiguous");
}

}  // namespace fastmlp

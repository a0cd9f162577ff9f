// Checks what the node of draw_node.h is made of, before a tape has it.
#include "draw_node.h"

namespace fastmlp {

void check_bernoulli(const at::Tensor& tensor, double p) {
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "fastmlp: p must be a probability, a number of 0 to 1, got ", p);
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, "fastmlp: tensor is of ",
                   tensor.scalar_type(), ", expected float32 or float64");
  TORCH_CHECK_VALUE(tensor.is_non_overlapping_and_dense(),
                    "fastmlp: tensor has gaps in memory or elements that share it, expected one without; make it "
                    "contiguous");
  TORCH_CHECK(operations_for(tensor).bernoulli, "fastmlp: there is no kernel that draws numbers for ", tensor.device());
}

}  // namespace fastmlp

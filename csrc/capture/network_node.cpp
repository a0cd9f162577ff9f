// The node declared in network_node.h: the shape of its input is read once.
#include "network_node.h"

#include <utility>

namespace fastmlp {

NetworkNode::NetworkNode(std::shared_ptr<const FrozenNetwork> network, const at::Tensor& input,
                         const at::Tensor& output)
    : network_(std::move(network)) {
  const FrozenNetwork::Form& form = network_->form();
  TORCH_CHECK_VALUE(input.dim() == 2 && input.size(1) == form.in_features(), "fastmlp: the input of a network is ",
                    input.sizes(), ", expected ", form.in_features(), " columns");
  TORCH_CHECK_VALUE(output.dim() == 2 && output.size(0) == input.size(0) && output.size(1) == form.out_features() &&
                        output.is_contiguous(),
                    "fastmlp: the output of a network is ", output.sizes(), ", expected ", form.out_features(),
                    " columns without gaps");
  view_.dims = 2;
  for (int d = 0; d < 2; d++) {
    view_.sizes[d] = input.size(d);
    view_.steps[d] = input.stride(d) * int64_t(input.itemsize());
  }
  keep(input, from_);
  keep(output, to_);
}

}  // namespace fastmlp

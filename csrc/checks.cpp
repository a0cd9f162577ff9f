// The wording and the rules of checks.h.
#include "checks.h"

#include <ATen/ATen.h>

#include <array>
#include <ostream>
#include <string>

namespace fastmlp {
namespace {

// Written only when an error is.
struct Name {
  const char* one;   // in a network of one layer
  const char* many;  // in a longer one, with the number of the layer
  const Stack& stack;
  size_t layer;

  friend std::ostream& operator<<(std::ostream& out, const Name& name) {
    if (name.stack.layers() == 1) return out << name.one;
    return out << name.many << '[' << name.layer << ']';
  }
};

template <class Name>
void check_kind(const Name& name, const at::Tensor& given, const at::Tensor& input, bool same_dtype) {
  TORCH_CHECK(given.layout() == at::kStrided, "fastmlp: ", name, " has layout ", given.layout(), ", expected ",
              at::kStrided);
  TORCH_CHECK(given.device() == input.device(), "fastmlp: ", name, " is on ", given.device(),
              ", expected the device of input, ", input.device());
  TORCH_CHECK(!same_dtype || given.scalar_type() == input.scalar_type(), "fastmlp: ", name, " has dtype ",
              given.scalar_type(), ", expected the dtype of input, ", input.scalar_type());
}

struct SavedName {
  size_t index;
  friend std::ostream& operator<<(std::ostream& out, const SavedName& name) {
    return out << "saved[" << name.index << ']';
  }
};

template <class Name>
void check_saved(const Name& name, const at::Tensor& given, const at::Tensor& input, c10::SymIntArrayRef leading,
                 const c10::SymInt& features) {
  check_kind(name, given, input, true);
  const auto sizes = given.sym_sizes();
  bool equal = sizes.size() == leading.size() + 1 && sizes.back() == features;
  for (size_t d = 0; equal && d < leading.size(); d++) equal = sizes[d] == leading[d];
  TORCH_CHECK(equal, "fastmlp: ", name, " has shape ", sizes, ", expected leading dimensions ", leading,
              " and last dimension ", features);
}

}  // namespace

const char* dtype_name(at::ScalarType dtype) {
  constexpr auto count = size_t(at::ScalarType::Undefined);  // the last one
  static const std::array<std::string, count> names = [] {
    std::array<std::string, count> all;
    for (size_t i = 0; i < all.size(); i++) {
      all[i] = "torch." + std::string(c10::getDtypeNames(at::ScalarType(i)).first);
    }
    return all;
  }();
  return size_t(dtype) < count ? names[size_t(dtype)].c_str() : "an undefined dtype";
}

void check_forward(const Stack& stack, const at::Tensor& input, at::TensorList parameters, bool same_dtype) {
  TORCH_CHECK(parameters.size() == stack.parameters(), "fastmlp: expected ", stack.parameters(),
              " parameters (a weight for each layer, and a bias where it has one), got ", parameters.size());
  TORCH_CHECK(input.defined(), "fastmlp: input is an undefined tensor");
  TORCH_CHECK(input.layout() == at::kStrided, "fastmlp: input has layout ", input.layout(), ", expected ",
              at::kStrided);
  TORCH_CHECK(input.dim() >= 1, "fastmlp: input has no dimension, expected at least one, of size in_features");
  TORCH_CHECK(at::isFloatingType(input.scalar_type()) || at::isComplexType(input.scalar_type()),
              "fastmlp: input has dtype ", input.scalar_type(), ", expected a floating point dtype");
  c10::SymInt features = input.sym_sizes().back();
  for (size_t l = 0; l < stack.layers(); l++) {
    const Name weight_name{"weight", "weights", stack, l};
    const at::Tensor& weight = parameters[stack.weight(l)];
    TORCH_CHECK(weight.defined(), "fastmlp: ", weight_name, " is an undefined tensor");
    check_kind(weight_name, weight, input, same_dtype);
    TORCH_CHECK(weight.dim() == 2, "fastmlp: ", weight_name, " has shape ", weight.sym_sizes(),
                ", expected two dimensions, (out_features, in_features)");
    if (l == 0) {
      TORCH_CHECK(weight.sym_size(1) == features, "fastmlp: input has shape ", input.sym_sizes(), ", expected ",
                  weight.sym_size(1), " in the last dimension, since ", weight_name, " has shape ", weight.sym_sizes());
    } else {
      TORCH_CHECK(weight.sym_size(1) == features, "fastmlp: ", weight_name, " has shape ", weight.sym_sizes(),
                  ", expected ", features, " in the last dimension, the out_features of the layer before");
    }
    features = weight.sym_size(0);
    if (!stack.has_bias(l)) continue;
    const Name bias_name{"bias", "biases", stack, l};
    const at::Tensor& bias = parameters[stack.bias(l)];
    TORCH_CHECK(bias.defined(), "fastmlp: ", bias_name, " is an undefined tensor");
    check_kind(bias_name, bias, input, same_dtype);
    TORCH_CHECK(bias.dim() == 1 && bias.sym_size(0) == features, "fastmlp: ", bias_name, " has shape ",
                bias.sym_sizes(), ", expected [", features, "], the out_features of ", weight_name);
  }
}

void check_backward(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                    at::TensorList parameters, const std::vector<bool>& needs) {
  check_forward(stack, input, parameters);
  TORCH_CHECK(needs.size() == 1 + stack.parameters(), "fastmlp: needs has ", needs.size(), " entries, expected ",
              1 + stack.parameters(), ", one for the input and one for each parameter");
  TORCH_CHECK(saved.size() == stack.saved(), "fastmlp: saved has ", saved.size(), " tensors, expected ", stack.saved());
  const auto sizes = input.sym_sizes();
  const auto leading = sizes.slice(0, sizes.size() - 1);
  for (size_t l = 0; l < saved.size(); l++) {
    check_saved(SavedName{l}, saved[l], input, leading, parameters[stack.weight(l)].sym_size(0));
  }
  TORCH_CHECK(grad.defined(), "fastmlp: grad is an undefined tensor");
  check_saved("grad", grad, input, leading, parameters[stack.weight(stack.layers() - 1)].sym_size(0));
}

}  // namespace fastmlp

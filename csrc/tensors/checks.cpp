// The rules of checks.h and the words of their errors. Called at every forward and backward, so what only an error
// needs, such as names, must not be put together before there is one.
#include "checks.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <ostream>
#include <string>

#include "dtypes.h"

namespace fastmlp {
namespace {

// All that an error may have to mention.
struct Arguments {
  const Stack& stack;
  const at::Tensor& input;
  at::TensorList parameters;
  const ModuleNames* module;
};

// Of a parameter. Written only when an error is.
struct Name {
  const Arguments& all;
  size_t layer;
  bool is_bias;

  friend std::ostream& operator<<(std::ostream& out, const Name& name) {
    const char* const one = name.is_bias ? "bias" : "weight";
    if (name.all.module) {
      const std::string& owner = name.all.module->layers[name.layer];
      return owner.empty() ? out << one : out << owner << '.' << one;
    }
    if (name.all.stack.layers() == 1) return out << one;
    return out << (name.is_bias ? "biases" : "weights") << '[' << name.layer << ']';
  }
};

const char* input_name(const Arguments& all) { return all.module ? all.module->input.c_str() : "input"; }

// Whether what the caller passed is what the layers see.
bool passes_input(const Arguments& all) { return !all.module || all.module->input == "input"; }

std::string move_to(const at::Device& device) { return ".to(\"" + device.str() + "\")"; }

bool is_computable(at::ScalarType dtype) { return at::isFloatingType(dtype) || at::isComplexType(dtype); }

// Whether all parameters agree, so that it is the input that is different.
template <class Property> bool agree(at::TensorList parameters, const Property& property) {
  return std::all_of(parameters.begin(), parameters.end(), [&](const at::Tensor& parameter) {
    return parameter.defined() && property(parameter) == property(parameters.front());
  });
}

[[noreturn]] void refuse_dtype(const Name& name, const at::Tensor& parameter) {
  const Arguments& all = name.all;
  const at::ScalarType given = all.input.scalar_type(), own = parameter.scalar_type();
  const bool input_differs = agree(all.parameters, [](const at::Tensor& t) { return t.scalar_type(); });
  if (!input_differs || !is_computable(own)) {
    TORCH_CHECK(false, "fastmlp: ", name, " has dtype ", dtype_name(own), ", expected ", dtype_name(given),
                ", the dtype of ", input_name(all), all.module ? "; call model" : "; pass ",
                all.module ? std::string() : c10::str(name), cast_to(given));
  }
  const std::string remedy = !passes_input(all)
                                 ? "call model" + cast_to(own) + ", so that all layers have one dtype"
                                 : "pass input" + cast_to(own) +
                                       (all.module && is_computable(given) ? ", or call model" + cast_to(given) : "");
  TORCH_CHECK(false, "fastmlp: ", input_name(all), " has dtype ", dtype_name(given), ", expected ", dtype_name(own),
              ", the dtype of ", name, "; ", remedy);
}

[[noreturn]] void refuse_device(const Name& name, const at::Tensor& parameter) {
  const Arguments& all = name.all;
  const at::Device given = all.input.device(), own = parameter.device();
  const bool input_differs = agree(all.parameters, [](const at::Tensor& t) { return t.device(); });
  if (given.is_meta()) {
    TORCH_CHECK(false, "fastmlp: ", input_name(all), " is on meta, where tensors have no values, expected ", own,
                ", the device of ", name, "; pass a tensor with values");
  }
  if (own.is_meta()) {
    TORCH_CHECK(false, "fastmlp: ", name, " is on meta, where tensors have no values, expected ", given,
                ", the device of ", input_name(all), "; ",
                all.module ? "call model.to_empty(device=\"" + given.str() + "\") and load its state_dict"
                           : "pass a tensor with values");
  }
  if (!input_differs) {
    TORCH_CHECK(false, "fastmlp: ", name, " is on ", own, ", expected ", given, ", the device of ", input_name(all),
                all.module ? "; call model" : "; pass ", all.module ? std::string() : c10::str(name), move_to(given));
  }
  const std::string remedy = !passes_input(all)
                                 ? "call model" + move_to(own) + ", so that all layers are on one device"
                                 : "pass input" + move_to(own) + (all.module ? ", or call model" + move_to(given) : "");
  TORCH_CHECK(false, "fastmlp: ", input_name(all), " is on ", given, ", expected ", own, ", the device of ", name, "; ",
              remedy);
}

void check_kind(const Name& name, const at::Tensor& given, bool same_dtype) {
  const at::Tensor& input = name.all.input;
  TORCH_CHECK(given.defined(), "fastmlp: ", name, " is an undefined tensor");
  TORCH_CHECK(given.layout() == at::kStrided, "fastmlp: ", name, " has layout ", given.layout(), ", expected ",
              at::kStrided, "; pass ", name, ".to_dense()");
  if (given.device() != input.device()) refuse_device(name, given);
  if (same_dtype && given.scalar_type() != input.scalar_type()) refuse_dtype(name, given);
}

// The kernels compute in float32 for all dtypes but float64; torch refuses the same.
void check_scalars(const Stack& stack, const at::Tensor& input) {
  if (stack.fits_float() || input.scalar_type() == at::kDouble) return;
  for (size_t l = 0; l < stack.layers(); l++) {
    const ActivationSpec& spec = stack.activation(l);
    const ActivationInfo& info = activation_info(spec.kind);
    const double values[] = {spec.scalars.a, spec.scalars.b};
    for (int i = 0; i < 2; i++) {
      TORCH_CHECK(Stack::fits_float(values[i]), "fastmlp: ", info.parameters[i].name, " of activation ", info.name,
                  " is ", values[i], ", expected a number that torch.float32 can hold, in which input of dtype ",
                  dtype_name(input.scalar_type()), " is computed; choose a smaller one, or pass input.double()");
    }
  }
}

struct SavedName {
  size_t index;
  friend std::ostream& operator<<(std::ostream& out, const SavedName& name) {
    return out << "saved[" << name.index << ']';
  }
};

template <class Name>
void check_saved(const Name& name, const at::Tensor& given, const at::Tensor& input, c10::SymIntArrayRef leading,
                 const c10::SymInt& features, bool is_mask = false) {
  TORCH_CHECK(given.defined(), "fastmlp: ", name, " is an undefined tensor");
  TORCH_CHECK(given.layout() == at::kStrided, "fastmlp: ", name, " has layout ", given.layout(), ", expected ",
              at::kStrided);
  TORCH_CHECK(given.device() == input.device(), "fastmlp: ", name, " is on ", given.device(), ", expected ",
              input.device(), ", the device of input");
  const at::ScalarType dtype = is_mask ? at::kByte : input.scalar_type();
  TORCH_CHECK(given.scalar_type() == dtype, "fastmlp: ", name, " has dtype ", dtype_name(given.scalar_type()),
              ", expected ", dtype_name(dtype), is_mask ? ", of what dropout keeps" : ", the dtype of input");
  const auto sizes = given.sym_sizes();
  bool equal = sizes.size() == leading.size() + 1 && sizes.back() == features;
  for (size_t d = 0; equal && d < leading.size(); d++) equal = sizes[d] == leading[d];
  TORCH_CHECK(equal, "fastmlp: ", name, " has shape ", sizes, ", expected leading dimensions ", leading,
              " and last dimension ", features);
}

}  // namespace

void check_forward(const Stack& stack, const at::Tensor& input, at::TensorList parameters, bool same_dtype,
                   const ModuleNames* names) {
  TORCH_CHECK(parameters.size() == stack.parameters(), "fastmlp: expected ", stack.parameters(),
              " parameters (a weight for each layer, and a bias where it has one), got ", parameters.size());
  TORCH_CHECK(input.defined(), "fastmlp: input is an undefined tensor");
  const Arguments all{stack, input, parameters, names};
  TORCH_CHECK(input.layout() == at::kStrided, "fastmlp: input has layout ", input.layout(), ", expected ", at::kStrided,
              "; pass input.to_dense()");
  TORCH_CHECK(
      input.dim() >= 1, "fastmlp: ", input_name(all),
      " has no dimension, expected at least one, of size in_features; pass input.reshape(1) for a single number");
  c10::SymInt features = input.sym_sizes().back();
  for (size_t l = 0; l < stack.layers(); l++) {
    const Name weight_name{all, l, false};
    const at::Tensor& weight = parameters[stack.weight(l)];
    check_kind(weight_name, weight, same_dtype);
    TORCH_CHECK(weight.dim() == 2, "fastmlp: ", weight_name, " has shape ", weight.sym_sizes(),
                ", expected two dimensions, (out_features, in_features)");
    if (l == 0) {
      TORCH_CHECK(weight.sym_size(1) == features, "fastmlp: ", input_name(all), " has shape ", input.sym_sizes(),
                  ", expected ", weight.sym_size(1), " in the last dimension, since ", weight_name, " has shape ",
                  weight.sym_sizes());
    } else {
      TORCH_CHECK(weight.sym_size(1) == features, "fastmlp: ", weight_name, " has shape ", weight.sym_sizes(),
                  ", expected ", features, " in the last dimension, the out_features of the layer before");
    }
    features = weight.sym_size(0);
    if (!stack.has_bias(l)) continue;
    const Name bias_name{all, l, true};
    const at::Tensor& bias = parameters[stack.bias(l)];
    check_kind(bias_name, bias, same_dtype);
    TORCH_CHECK(bias.dim() == 1 && bias.sym_size(0) == features, "fastmlp: ", bias_name, " has shape ",
                bias.sym_sizes(), ", expected [", features, "], the out_features of ", weight_name);
  }
  TORCH_CHECK(is_computable(input.scalar_type()), "fastmlp: ", input_name(all), " has dtype ",
              dtype_name(input.scalar_type()), ", expected a floating point dtype; pass input.float()");
  check_scalars(stack, input);
}

void check_backward(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                    at::TensorList parameters, const std::vector<bool>& needs) {
  check_forward(stack, input, parameters);
  TORCH_CHECK(needs.size() == 1 + stack.parameters(), "fastmlp: needs has ", needs.size(), " entries, expected ",
              1 + stack.parameters(), ", one for the input and one for each parameter");
  TORCH_CHECK(saved.size() == stack.saved(), "fastmlp: saved has ", saved.size(), " tensors, expected ", stack.saved());
  const auto sizes = input.sym_sizes();
  const auto leading = sizes.slice(0, sizes.size() - 1);
  const auto features = [&](size_t l) { return parameters[stack.weight(l)].sym_size(0); };
  size_t next = 0;
  for (size_t l = 0; next < stack.masks(); l++) {
    if (!stack.drops(l)) continue;
    check_saved(SavedName{next}, saved[next], input, leading, features(l), true);
    next++;
  }
  for (size_t l = 0; next < saved.size(); l++, next++) {
    check_saved(SavedName{next}, saved[next], input, leading, features(l));
  }
  check_saved("grad", grad, input, leading, parameters[stack.weight(stack.layers() - 1)].sym_size(0));
}

}  // namespace fastmlp

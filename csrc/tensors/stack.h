// What a list of layers is besides its tensors: which have a bias, and their activations. Parsed
// once and kept by Python and by the autograd graph for direct calls, or from a schema's flat lists; read by checks.h
// and by every device's register file.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/ivalue.h>
#include <c10/util/ArrayRef.h>

#include <vector>

#include "../contract/activation_info.h"

namespace fastmlp {

class Stack : public torch::CustomClassHolder {
 public:
  // `scalars` holds two values a layer. Raises ValueError for lists that do not belong together or
  // an activation that does not exist.
  Stack(std::vector<bool> has_bias, std::vector<int64_t> activations, std::vector<double> scalars);
  Stack(const c10::List<bool>& has_bias, c10::IntArrayRef activations, c10::ArrayRef<double> scalars);

  size_t layers() const { return weights_.size(); }
  // Positions in the flat list of parameters: weight, bias (if any), weight, ...
  size_t parameters() const { return parameters_; }
  size_t weight(size_t layer) const { return weights_[layer]; }
  bool has_bias(size_t layer) const { return has_bias_[layer]; }
  size_t bias(size_t layer) const { return weights_[layer] + 1; }
  const ActivationSpec& activation(size_t layer) const { return activations_[layer]; }

  // Whether lists like those that a stack is made from would make this one.
  template <class Bools, class Ints, class Doubles>
  bool equals(const Bools& has_bias, const Ints& activations, const Doubles& scalars) const {
    if (has_bias.size() != layers()) return false;
    for (size_t l = 0; l < layers(); l++) {
      const auto& [kind, parameters] = activations_[l];
      if (has_bias_[l] != has_bias[l] || kind != activations[l] || parameters.a != scalars[2 * l] ||
          parameters.b != scalars[2 * l + 1])
        return false;
    }
    return true;
  }

  // Whether a parameter of an activation is still one in float32, in which all dtypes but float64 are computed.
  static bool fits_float(double scalar);
  bool fits_float() const { return fits_float_; }

  bool keeps_output(size_t layer) const { return fastmlp::keeps_output(activations_[layer]); }
  // Tensors that forward keeps for backward: one a layer, but none for a last layer without
  // activation, so that changing the network's output in place stays legal.
  bool last_is_identity() const { return activations_.back().kind == identity_kind; }
  size_t saved() const { return layers() - (last_is_identity() ? 1 : 0); }
  // Those of them that are not the output itself.
  size_t hidden() const { return layers() - (keeps_output(layers() - 1) ? 1 : 0); }

 private:
  std::vector<bool> has_bias_;
  std::vector<ActivationSpec> activations_;
  std::vector<size_t> weights_;
  size_t parameters_ = 0;
  bool fits_float_ = true;
};

}  // namespace fastmlp

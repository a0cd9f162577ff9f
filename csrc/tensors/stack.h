// What a network is besides its tensors: its layers, and where the parameters of each stand in a flat list. Made once
// and kept by Python and by the autograd graph, or made from the lists of an operator's schema at each call; read by
// checks.h and by every device's register file. Must not change after it was made, because threads share it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/util/ArrayRef.h>

#include <vector>

#include "../contract/activation_info.h"

namespace fastmlp {

class Stack : public torch::CustomClassHolder {
 public:
  // Raises ValueError for no layers, or for an activation that does not exist.
  explicit Stack(std::vector<LayerSpec> layers);
  // From the lists of an operator's schema, which are also those of Python; `scalars` holds two values a layer. Raises
  // ValueError for lists that do not belong together, too.
  Stack(const std::vector<bool>& has_bias, c10::IntArrayRef activations, c10::ArrayRef<double> scalars);

  size_t layers() const { return specs_.size(); }
  c10::ArrayRef<LayerSpec> specs() const { return specs_; }
  bool has_bias(size_t layer) const { return specs_[layer].has_bias; }
  bool has_weight(size_t layer) const { return specs_[layer].has_weight; }
  const ActivationSpec& activation(size_t layer) const { return specs_[layer].activation; }
  bool drops(size_t layer) const { return specs_[layer].dropout > 0; }
  // Positions in the flat list of parameters: weight, bias (if any), weight, ...
  size_t parameters() const { return parameters_; }
  size_t weight(size_t layer) const { return weights_[layer]; }
  size_t bias(size_t layer) const { return weights_[layer] + (has_weight(layer) ? 1 : 0); }

  // Whether a parameter of an activation is still a number in float32, in which all dtypes but float64 are computed.
  static bool fits_float(double scalar);
  bool fits_float() const { return fits_float_; }

  bool keeps_output(size_t layer) const { return fastmlp::keeps_output(activation(layer)); }
  // Tensors that forward keeps for backward: what was drawn for each layer that drops, a byte an element; then one a
  // layer, but none for a last layer without activation, so that changing the network's output in place stays legal.
  bool last_is_identity() const { return specs_.back().activation.kind == identity_kind; }
  size_t masks() const { return masks_; }
  size_t saved() const { return masks_ + layers() - (last_is_identity() ? 1 : 0); }
  // Those of them that are not the output itself.
  bool output_is_saved() const { return !last_is_identity() && keeps_output(layers() - 1) && !drops(layers() - 1); }
  size_t hidden() const { return saved() - (output_is_saved() ? 1 : 0); }

 private:
  std::vector<LayerSpec> specs_;
  std::vector<size_t> weights_;
  size_t parameters_ = 0, masks_ = 0;
  bool fits_float_ = true;
};

// What a batch normalisation in a training step has besides its parameters and its place in the stack. Running
// statistics are gapless, and undefined where it has none.
struct NormTensors {
  at::Tensor running_mean, running_variance;
  bool of_batch = false;  // normalises by the mean and variance of the batch
  double momentum = 0, eps = 0;
};

// Layers as the lists from which a Stack is made, for Python.
struct LayerLists {
  std::vector<bool> has_bias;
  std::vector<int64_t> activations;
  std::vector<double> scalars;
  std::vector<double> dropouts;  // in no operator's schema

  explicit LayerLists(c10::ArrayRef<LayerSpec> layers);
};

}  // namespace fastmlp

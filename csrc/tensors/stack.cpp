// Checks what a Stack is made of, and turns the lists of an operator's schema into layers and back (stack.h).
#include "stack.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <limits>
#include <utility>

namespace fastmlp {
namespace {

void check_kind(int64_t kind, size_t layer) {
  TORCH_CHECK_VALUE(kind >= 0 && kind < Activations::size, "fastmlp: activation ", kind, " of layer ", layer,
                    " does not exist, expected 0 to ", Activations::size - 1);
}

void check_parameters(const ActivationSpec& spec) {
  const ActivationInfo& info = activation_info(spec.kind);
  const double values[] = {spec.scalars.a, spec.scalars.b};
  for (int i = 0; i < 2; i++) {
    const ParameterInfo& parameter = info.parameters[i];
    TORCH_CHECK_VALUE(parameter.allows(values[i]), "fastmlp: ", parameter.name, " of activation ", info.name, " is ",
                      values[i], ", expected a number above 0");
  }
}

std::vector<LayerSpec> layers_of(const std::vector<bool>& has_bias, c10::IntArrayRef activations,
                                 c10::ArrayRef<double> scalars) {
  const size_t n = has_bias.size();
  TORCH_CHECK_VALUE(activations.size() == n, "fastmlp: expected one activation for each of ", n, " layers, got ",
                    activations.size());
  TORCH_CHECK_VALUE(scalars.size() == 2 * n, "fastmlp: expected two scalars for each of ", n, " layers, got ",
                    scalars.size());
  std::vector<LayerSpec> layers(n);
  for (size_t l = 0; l < n; l++) {
    check_kind(activations[l], l);  // before the number is cut to an int
    layers[l].has_bias = has_bias[l];
    layers[l].activation = {int(activations[l]), {scalars[2 * l], scalars[2 * l + 1]}};
    check_parameters(layers[l].activation);
  }
  return layers;
}

}  // namespace

Stack::Stack(std::vector<LayerSpec> layers) : specs_(std::move(layers)) {
  TORCH_CHECK_VALUE(!specs_.empty(), "fastmlp: a network needs at least one layer, got none");
  for (size_t l = 0; l < specs_.size(); l++) {
    const LayerSpec& spec = specs_[l];
    const Scalars& scalars = spec.activation.scalars;
    check_kind(spec.activation.kind, l);
    fits_float_ = fits_float_ && fits_float(scalars.a) && fits_float(scalars.b);
    weights_.push_back(parameters_);
    parameters_ += size_t(spec.has_weight) + size_t(spec.has_bias);
    masks_ += size_t(spec.dropout > 0);
  }
}

Stack::Stack(const std::vector<bool>& has_bias, c10::IntArrayRef activations, c10::ArrayRef<double> scalars)
    : Stack(layers_of(has_bias, activations, scalars)) {}

bool Stack::fits_float(double scalar) {
  return !std::isfinite(scalar) || std::abs(scalar) <= double(std::numeric_limits<float>::max());
}

LayerLists::LayerLists(c10::ArrayRef<LayerSpec> layers) {
  for (const LayerSpec& layer : layers) {
    has_bias.push_back(layer.has_bias);
    activations.push_back(layer.activation.kind);
    scalars.insert(scalars.end(), {layer.activation.scalars.a, layer.activation.scalars.b});
    dropouts.push_back(layer.dropout);
  }
}

}  // namespace fastmlp

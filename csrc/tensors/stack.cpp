// Parses and validates the lists behind a Stack.
#include "stack.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <limits>
#include <utility>

namespace fastmlp {

Stack::Stack(std::vector<bool> has_bias, std::vector<int64_t> activations, std::vector<double> scalars)
    : has_bias_(std::move(has_bias)) {
  const size_t n = has_bias_.size();
  TORCH_CHECK_VALUE(n > 0, "fastmlp: a network needs at least one layer, got none");
  TORCH_CHECK_VALUE(activations.size() == n, "fastmlp: expected one activation for each of ", n, " layers, got ",
                    activations.size());
  TORCH_CHECK_VALUE(scalars.size() == 2 * n, "fastmlp: expected two scalars for each of ", n, " layers, got ",
                    scalars.size());
  for (size_t l = 0; l < n; l++) {
    TORCH_CHECK_VALUE(activations[l] >= 0 && activations[l] < Activations::size, "fastmlp: activation ", activations[l],
                      " of layer ", l, " does not exist, expected 0 to ", Activations::size - 1);
    activations_.push_back({int(activations[l]), {scalars[2 * l], scalars[2 * l + 1]}});
    fits_float_ = fits_float_ && fits_float(scalars[2 * l]) && fits_float(scalars[2 * l + 1]);
    weights_.push_back(parameters_);
    parameters_ += has_bias_[l] ? 2 : 1;
  }
}

Stack::Stack(const c10::List<bool>& has_bias, c10::IntArrayRef activations, c10::ArrayRef<double> scalars)
    : Stack(std::vector<bool>(has_bias.begin(), has_bias.end()), activations.vec(), scalars.vec()) {}

bool Stack::fits_float(double scalar) {
  return !std::isfinite(scalar) || std::abs(scalar) <= double(std::numeric_limits<float>::max());
}

}  // namespace fastmlp

// Sizes and layouts that the strategy of every device counts with, and where a pass reads and writes. Used by baseline
// code of the CPU, and by host and device code of CUDA; not by ISA files, in whose target region these functions would
// be emitted with that ISA's instructions under symbols that other files share.
#pragma once

#include <cstddef>

#include "activation_info.h"
#include "problem.h"

namespace fastmlp {

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_divide(a, b) * b; }

// [rows, columns] row by row.
inline Matrix gapless(void* data, int64_t columns) { return {data, columns, 1}; }

// The most features between two layers.
inline int64_t widest_hidden(const Network& network) {
  int64_t width = 0;
  for (size_t l = 0; l + 1 < network.layers.size(); l++) {
    const int64_t features = network.layers[l].out_features;
    if (features > width) width = features;
  }
  return width;
}

// Where a layer's output before dropout, its pre-activation, and its output after dropout go. Null for what is not
// kept; the third one also where nothing is dropped.
struct LayerOutputs {
  void* output;
  void* pre_activation;
  void* dropped;
};

inline LayerOutputs outputs_of(const ForwardPass& pass, size_t l) {
  const Layer& layer = pass.network.layers[l];
  const bool last = l + 1 == pass.network.layers.size(), keeps = keeps_output(layer.activation);
  void* const kept = pass.kept.empty() ? nullptr : pass.kept[l];
  void* const end = last ? pass.output : nullptr;
  return {end && !layer.drops() ? end : keeps ? kept : nullptr, keeps ? nullptr : kept, layer.drops() ? end : nullptr};
}

// The first layer that a gradient is asked of; as many as there are layers if there is none.
inline size_t lowest_layer(const BackwardPass& pass) {
  size_t lowest = 0;
  if (pass.grad_input) return lowest;
  while (lowest < pass.network.layers.size() && !pass.grad_weights[lowest] && !pass.grad_biases[lowest]) lowest++;
  return lowest;
}

// What derivatives keep for backward (derivatives.h): what lies before the activation of each layer, except of a last
// one that has none.
inline bool keeps_components(const Network& network, size_t l) {
  return l + 1 < network.layers.size() || network.layers[l].activation.kind != identity_kind;
}
inline int64_t kept_features(const Network& network) {
  int64_t features = 0;
  for (size_t l = 0; l < network.layers.size(); l++) {
    if (keeps_components(network, l)) features += network.layers[l].out_features;
  }
  return features;
}

}  // namespace fastmlp

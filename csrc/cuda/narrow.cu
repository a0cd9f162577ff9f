// Fills the argument of the fused kernels. float32 only: 16-bit networks go to tensor cores layer by layer, and float64
// does not fit into shared memory.
#include "narrow.h"

#include <algorithm>

#include "../activation_info.h"
#include "tiles.h"
#include "workspace.h"

namespace fastmlp::cuda {
namespace {

// Sums of all blocks of a backward, at most.
constexpr int64_t sums_bytes = int64_t(64) << 20;

StridedMatrix<float> strided(const Matrix& x) {
  return {static_cast<const float*>(x.data), x.row_stride, x.column_stride};
}

FusedNetwork<float> fused(const Network& network) {
  FusedNetwork<float> p;
  p.rows = network.rows;
  p.layers = int(network.layers.size());
  p.input = strided(network.input);
  for (int l = 0; l < p.layers; l++) {
    const Layer& layer = network.layers[size_t(l)];
    FusedLayer<float>& to = p.layer[l];
    to.in_features = int(layer.in_features);
    to.out_features = int(layer.out_features);
    to.weight = strided(layer.weight);
    to.activation = layer.activation;
    to.bias = static_cast<const float*>(layer.bias.data);
    to.bias_stride = layer.bias.stride;
    to.keeps_output = keeps_output(layer.activation);
  }
  return p;
}

}  // namespace

bool goes_fused(const Context& context, const Network& network) {
  const auto fits = [](int64_t features) { return features >= 1 && features <= fused_width; };
  return context.fuses && network.dtype == DType::float32 && network.rows > 0 && network.layers.size() >= 2 &&
         network.layers.size() <= size_t(most_fused_layers) && fits(network.layers[0].in_features) &&
         std::all_of(network.layers.begin(), network.layers.end(),
                     [&](const Layer& layer) { return fits(layer.out_features); });
}

void forward_fused(const Context& context, const ForwardPass& pass) {
  FusedNetwork<float> p = fused(pass.network);
  for (int l = 0; l < p.layers; l++) {
    float* const kept = pass.kept.empty() ? nullptr : static_cast<float*>(pass.kept[size_t(l)]);
    (p.layer[l].keeps_output ? p.layer[l].output : p.layer[l].pre_activation) = kept;
  }
  p.layer[p.layers - 1].output = static_cast<float*>(pass.output);
  Kernels<float>::fused_forward(context, p);
}

void backward_fused(const Context& context, const BackwardPass& pass) {
  FusedNetwork<float> p = fused(pass.network);
  const size_t lowest = lowest_layer(pass);
  if (lowest >= pass.network.layers.size()) return;
  p.lowest = int(lowest);
  p.grad = strided(pass.grad_output);
  p.grad_input = static_cast<float*>(pass.grad_input);
  int64_t parameters = 0;
  for (const Layer& layer : pass.network.layers) parameters += layer.out_features * (layer.in_features + 1);
  const int64_t runs = (p.rows + fused_backward_rows - 1) / fused_backward_rows;
  const int64_t most = std::max<int64_t>(1, sums_bytes / int64_t(sizeof(float)) / parameters);
  const int64_t blocks = std::min({runs, 2 * tile_row(context.architecture).multiprocessors, most});
  with_memory(context, [&](Carver& carver, bool launches) {
    for (size_t l = lowest; l < pass.network.layers.size(); l++) {
      FusedLayer<float>& layer = p.layer[l];
      layer.saved = strided(pass.saved[l]);
      const int64_t outs = layer.out_features, weights = outs * layer.in_features;
      layer.weight_sums = pass.grad_weights[l] ? carver.take<float>(blocks * weights) : nullptr;
      layer.bias_sums = pass.grad_biases[l] ? carver.take<float>(blocks * outs) : nullptr;
    }
    // Of the layer below the lowest one only its output is read.
    if (lowest > 0) p.layer[lowest - 1].saved = strided(pass.saved[lowest - 1]);
    if (!launches) return;
    Kernels<float>::fused_backward(context, p, blocks);
    for (size_t l = lowest; l < pass.network.layers.size(); l++) {
      const FusedLayer<float>& layer = p.layer[l];
      const int64_t outs = layer.out_features, weights = outs * layer.in_features;
      if (layer.weight_sums)
        Kernels<float>::sum_partials(context, layer.weight_sums, blocks, weights,
                                     static_cast<float*>(pass.grad_weights[l]));
      if (layer.bias_sums)
        Kernels<float>::sum_partials(context, layer.bias_sums, blocks, outs, static_cast<float*>(pass.grad_biases[l]));
    }
  });
}

}  // namespace fastmlp::cuda

// Decides whether a network goes through one kernel, and fills the argument of that kernel (fused.h). There are no such
// kernels for float64, which does not fit into shared memory, nor for bfloat16 before sm_80, where tensor cores do not
// have it. Called by network.cu; launches through products.h only.
#include "narrow.h"

#include <algorithm>
#include <type_traits>

#include "../contract/activation_info.h"
#include "../contract/storage.h"
#include "tiles.h"
#include "workspace.h"

namespace fastmlp::cuda {
namespace {

// The most memory that the sums of all blocks of a backward take.
constexpr int64_t sums_bytes = int64_t(64) << 20;

bool has_kernels(int architecture, DType dtype) {
  return dtype == DType::bfloat16 ? architecture >= 80 : dtype != DType::float64;
}

// Calls f(S{}) for the dtype of a network that goes_fused accepts, which is never float64.
template <class F> void with_fused_storage(DType dtype, const F& f) {
  with_storage(dtype, [&](auto storage) {
    if constexpr (!std::is_same_v<decltype(storage), double>) f(storage);
  });
}

bool pays_by_table(const Network& network) {
  int64_t widest = 0;
  for (const Layer& layer : network.layers) widest = std::max({widest, layer.in_features, layer.out_features});
  return widest <= always_fused_width || (network.dtype != DType::float32 && network.rows >= wide_fused_rows);
}

template <class S> FusedNetwork<S> fused(const Network& network) {
  FusedNetwork<S> p;
  p.rows = network.rows;
  p.layers = int(network.layers.size());
  p.input = strided<S>(network.input);
  for (int l = 0; l < p.layers; l++) {
    const Layer& layer = network.layers[size_t(l)];
    FusedLayer<S>& to = p.layer[l];
    to.in_features = int(layer.in_features);
    to.out_features = int(layer.out_features);
    to.weight = strided<S>(layer.weight);
    to.activation = layer.activation;
    to.bias = static_cast<const S*>(layer.bias.data);
    to.bias_stride = layer.bias.stride;
    to.keeps_output = keeps_output(layer.activation);
    to.differentiates = layer.activation.kind != identity_kind;
  }
  return p;
}

template <class S> void fused_forward_of(const Context& context, const ForwardPass& pass) {
  FusedNetwork<S> p = fused<S>(pass.network);
  for (int l = 0; l < p.layers; l++) {
    const LayerOutputs kept = outputs_of(pass, size_t(l));
    p.layer[l].output = static_cast<S*>(kept.output);
    p.layer[l].pre_activation = static_cast<S*>(kept.pre_activation);
  }
  Kernels<S>::fused_forward(context, p);
}

// Makes room for one gradient among the sums of a block, and returns where it begins. Every gradient begins at a
// multiple of four elements, so that vectors stay aligned.
template <class S> int add_segment(FusedSums<S>& sums, void* output, int64_t count) {
  const int begin = int(sums.stride);
  sums.segment[sums.segments++] = {begin, begin + int(count), static_cast<S*>(output)};
  sums.stride += round_up(count, 4);
  return begin;
}

template <class S> void fused_backward_of(const Context& context, const BackwardPass& pass) {
  using C = Compute<S>;
  FusedNetwork<S> p = fused<S>(pass.network);
  const size_t lowest = lowest_layer(pass);
  if (lowest >= pass.network.layers.size()) return;
  p.lowest = int(lowest);
  p.grad = strided<S>(pass.grad_output);
  p.grad_input = static_cast<S*>(pass.grad_input);
  // The layer below the lowest one counts too, because its output is the lowest one's input.
  for (size_t l = lowest > 0 ? lowest - 1 : 0; l < pass.network.layers.size(); l++)
    p.layer[l].saved = strided<S>(pass.saved[l]);
  FusedSums<S> sums;
  int weights[most_fused_layers] = {}, biases[most_fused_layers] = {};
  for (size_t l = lowest; l < pass.network.layers.size(); l++) {
    const Layer& layer = pass.network.layers[l];
    if (pass.grad_weights[l])
      weights[l] = add_segment(sums, pass.grad_weights[l], layer.out_features * layer.in_features);
    if (pass.grad_biases[l]) biases[l] = add_segment(sums, pass.grad_biases[l], layer.out_features);
  }
  p.sums_stride = sums.stride;
  const int64_t most = sums_bytes / (int64_t(sizeof(C)) * std::max<int64_t>(1, sums.stride));
  sums.count = std::clamp<int64_t>(most, 1, Kernels<S>::fused_blocks(context, p));
  with_memory(context, [&](Carver& carver, bool launches) {
    C* const partials = carver.take<C>(sums.count * sums.stride);
    if (!launches) return;
    sums.partials = partials;
    for (size_t l = lowest; l < pass.network.layers.size(); l++) {
      p.layer[l].weight_sums = pass.grad_weights[l] ? partials + weights[l] : nullptr;
      p.layer[l].bias_sums = pass.grad_biases[l] ? partials + biases[l] : nullptr;
    }
    Kernels<S>::fused_backward(context, p, sums.count);
    if (sums.segments > 0) Kernels<S>::sum_fused(context, sums);
  });
}

}  // namespace

bool goes_fused(const Context& context, const Network& network) {
  const auto fits = [](int64_t features) { return features >= 1 && features <= fused_width; };
  return context.fuses.value_or(pays_by_table(network)) && has_kernels(context.architecture, network.dtype) &&
         network.rows > 0 && network.layers.size() >= 2 && network.layers.size() <= size_t(most_fused_layers) &&
         fits(network.layers[0].in_features) &&
         std::all_of(network.layers.begin(), network.layers.end(),
                     [&](const Layer& layer) { return fits(layer.out_features); });
}

void forward_fused(const Context& context, const ForwardPass& pass) {
  with_fused_storage(pass.network.dtype, [&](auto storage) { fused_forward_of<decltype(storage)>(context, pass); });
}

void backward_fused(const Context& context, const BackwardPass& pass) {
  with_fused_storage(pass.network.dtype, [&](auto storage) { fused_backward_of<decltype(storage)>(context, pass); });
}

}  // namespace fastmlp::cuda

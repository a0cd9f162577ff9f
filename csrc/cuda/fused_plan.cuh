// How the kernels of narrow networks run: which width and list of activations they are compiled for, their threads,
// blocks and shared memory. Arithmetic on the network's widths and the card's numbers; products.cuh, which includes
// this, launches.
#pragma once

#include <algorithm>
#include <type_traits>

#include "fragments.cuh"
#include "fused.cuh"
#include "products.h"

namespace fastmlp::cuda {
namespace {

// How a kernel of fused_mma_forward.cuh or fused_mma_backward.cuh is launched.
struct FusedPlan {
  unsigned threads = 0;
  size_t shared_bytes = 0;
  int64_t blocks = 0;
};

// Says which gradients of weights registers hold: the largest `count` of them.
template <class S> void hold_largest(FusedNetwork<S>& p, int count) {
  for (int h = 0; h < count; h++) {
    int64_t most = 0;
    int largest = -1;
    for (int l = p.lowest; l < p.layers; l++) {
      const FusedLayer<S>& layer = p.layer[l];
      const int64_t weights = int64_t(layer.out_features) * layer.in_features;
      if (!layer.weight_sums || layer.held >= 0 || weights <= most) continue;
      most = weights;
      largest = l;
    }
    if (largest >= 0) p.layer[largest].held = h;
  }
}

// Also gives the layers' weights their places in shared memory. All weights stay there if they fit beside the rows.
// Otherwise there are two slots, the next layer's weights coming ahead, if that leaves as many blocks on a
// multiprocessor as one slot, or if the batch has no more tiles than the card has multiprocessors. Otherwise there is
// one slot.
template <class S, int W, class Kinds, bool backward> FusedPlan plan_fused(const Context& context, FusedNetwork<S>& p) {
  using Shape = MmaFused<W>;
  constexpr int64_t warp_rows = 16 * (backward ? Shape::backward_fragments : Shape::forward_fragments);
  constexpr int64_t warp_elements = warp_rows * W * (backward ? 1 + Shape::stages : 1);
  constexpr int64_t most_warps = (backward ? Shape::backward_threads : Shape::forward_threads) / 32;
  constexpr int64_t by_registers = backward ? Shape::backward_blocks : Shape::forward_blocks;
  const int64_t limit = std::min(context.block_shared_bytes, most_block_shared);
  int64_t all = 0, largest = 0;
  for (int l = 0; l < p.layers; l++) {
    // The weights are a line for each output; forward has biases in float32 behind them.
    const int64_t elements = padded(p.layer[l].out_features) * (W + (backward ? 0 : 2));
    p.layer[l].place = int(all);
    all += elements;
    largest = std::max(largest, elements);
  }
  int64_t warps = most_warps;
  const auto bytes = [&](int64_t weights) { return int64_t(sizeof(S)) * (weights + warps * warp_elements); };
  const auto blocks_at_once = [&](int64_t weights) { return resident_blocks(context, bytes(weights), by_registers); };
  if (bytes(all) > limit) {
    const bool few = ceil_divide(p.rows, warps * warp_rows) <= context.multiprocessors;
    const bool two = bytes(2 * largest) <= limit && (few || blocks_at_once(2 * largest) == blocks_at_once(largest));
    p.slots = two ? 2 : 1;
  }
  p.weight_elements = int(p.slots == 0 ? all : p.slots * largest);
  while (bytes(p.weight_elements) > limit) warps--;
  if constexpr (backward) {
    if (warps == most_warps) hold_largest(p, held_parts<W, Kinds>);
  }
  // As few blocks as give each the same number of tiles.
  const int64_t tiles = ceil_divide(p.rows, warps * warp_rows);
  FusedPlan plan;
  plan.threads = unsigned(warps * 32);
  plan.shared_bytes = size_t(bytes(p.weight_elements));
  plan.blocks = ceil_divide(tiles, ceil_divide(tiles, context.multiprocessors * blocks_at_once(p.weight_elements)));
  return plan;
}

template <class S> int widest_layer(const FusedNetwork<S>& p) {
  int widest = p.layer[0].in_features;
  for (int l = 0; l < p.layers; l++) widest = std::max(widest, p.layer[l].out_features);
  return widest;
}

// Calls f with the width of the float32 kernels that take the network.
template <class S, class F> void with_fused_width(const FusedNetwork<S>& p, const F& f) {
  const int widest = widest_layer(p);
  if (widest <= 32) return f(std::integral_constant<int, 32>());
  if (widest <= 64) return f(std::integral_constant<int, 64>());
  f(std::integral_constant<int, 128>());
}

// Calls f with the width of the kernels on tensor cores that take the network, and their list of activations.
template <class S, class F> void with_mma_fused(const FusedNetwork<S>& p, const F& f) {
  bool light = true;
  for (int l = 0; l < p.layers; l++) light = light && p.layer[l].activation.kind < LightActivations::size;
  const auto with_kinds = [&](auto width) {
    if (light) return f(width, LightActivations());
    f(width, Activations());
  };
  if (widest_layer(p) <= 64) return with_kinds(std::integral_constant<int, 64>());
  with_kinds(std::integral_constant<int, 128>());
}

}  // namespace
}  // namespace fastmlp::cuda

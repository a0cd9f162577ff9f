// Forward of narrow float16 and bfloat16 networks on tensor cores, all layers in one launch. A warp owns rows and takes
// them through the layers in registers: the sums of one layer, activated and rounded, already lie as the next layer's
// operand A. Shared memory holds weights, and rows on their way in and out. Launched by products.cuh.
#pragma once

#include "fragments.cuh"

namespace fastmlp::cuda {

// Begins to copy what the first tile of rows needs: all weights if they stay, or the first of two layers by turns.
template <class S, int W> __device__ __forceinline__ void load_first_weights(S* memory, const FusedNetwork<S>& p) {
  if (p.slots == 0) {
    for (int l = 0; l < p.layers; l++) load_weights<S, W, true>(memory + p.layer[l].place, p.layer[l]);
  } else if (p.slots == 2) {
    load_weights<S, W, true>(memory, p.layer[0]);
  }
}

// Returns where layer l's weights lie, once they do. With two slots it also begins to copy those of the layer that
// follows, which after the last layer is the first one of another tile, and moves `place` to their slot.
template <class S, int W>
__device__ __forceinline__ const S* weights_of(S* memory, const FusedNetwork<S>& p, int l, bool another_tile,
                                               int& place) {
  const FusedLayer<S>& layer = p.layer[l];
  const S* weights = memory + layer.place;
  if (p.slots == 1) {
    weights = memory;
    __syncthreads();
    load_weights<S, W, true>(memory, layer);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
  } else if (p.slots == 2) {
    weights = memory + place;
    place = p.weight_elements / 2 - place;
    wait_for_copies<0>();
    __syncthreads();
    const bool last = l + 1 == p.layers;
    if (!last || another_tile) load_weights<S, W, true>(memory + place, p.layer[last ? 0 : l + 1]);
    commit_copies();
  }
  return weights;
}

// The sums of block n begin with the biases of its 16 features.
template <int fragments>
__device__ __forceinline__ void begin_with_bias(float (&sums)[fragments][2][4], const float* bias, int n) {
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const auto pair = *reinterpret_cast<const Vec<float, 2>*>(bias + n * 16 + j * 8 + threadIdx.x % 4 * 2);
#pragma unroll
    for (int m = 0; m < fragments; m++) {
#pragma unroll
      for (int e = 0; e < 4; e++) sums[m][j][e] = pair.element[e % 2];
    }
  }
}

// Applies the layer's activation to block n, whose pre-activation goes to `lines` if it is kept.
template <class S, int W, class Kinds, int fragments>
__device__ __forceinline__ void activate(float (&sums)[fragments][2][4], const FusedLayer<S>& layer, S* lines, int n) {
  if (layer.pre_activation) {
#pragma unroll
    for (int m = 0; m < fragments; m++) {
      Fragment packed;
      pack<S>(packed, sums[m]);
      put<S, W>(lines, packed, m, n);
    }
  }
  with_activation(layer.activation.kind, Kinds{}, [&](auto activation) {
    using A = decltype(activation);
    each_fragment<true>(sums, [&](float (&values)[2][4], int) {
#pragma unroll
      for (int i = 0; i < 8; i++)
        values[i / 4][i % 4] = A::template value<ScalarMath<float>>(values[i / 4][i % 4], layer.activation.scalars);
    });
  });
}

// next[.][n] = block n of the layer's outputs.
template <class S, int W, class Kinds, int fragments>
__device__ __forceinline__ void forward_block(Fragment (&next)[fragments][W / 16],
                                              const Fragment (&x)[fragments][W / 16], const FusedLayer<S>& layer,
                                              const S* weights, S* lines, int n) {
  const auto* const bias = reinterpret_cast<const float*>(weights + padded(layer.out_features) * W);
  float sums[fragments][2][4];
  begin_with_bias(sums, bias, n);
  multiply_block<S, W, false>(sums, x, weights, n, layer.in_features);
  if constexpr (!is_light<Kinds>) activate<S, W, Kinds>(sums, layer, lines, n);
  mask(sums, n, layer.out_features, fragments * 16);
#pragma unroll
  for (int m = 0; m < fragments; m++) {
    Fragment packed;
    if (is_light<Kinds> && layer.differentiates) {
      pack_above_zero<S>(packed, sums[m]);
    } else {
      pack<S>(packed, sums[m]);
    }
    keep_block(next[m], packed, n);
  }
}

// x = the layer's outputs for the warp's rows, of which `rows` exist, from row `first` of the batch on. What is kept of
// them goes through `lines` to memory.
template <class S, int W, class Kinds, int fragments>
__device__ __forceinline__ void forward_layer(Fragment (&x)[fragments][W / 16], const FusedLayer<S>& layer,
                                              const S* weights, S* lines, int64_t first, int rows) {
  const int out = layer.out_features;
  Fragment next[fragments][W / 16];
#pragma unroll(is_light<Kinds> ? W / 16 : 1)
  for (int n = 0; n < W / 16; n++) {
    if (n * 16 >= out) break;
    forward_block<S, W, Kinds>(next, x, layer, weights, lines, n);
  }
  clear_blocks(next, out);
  if (layer.pre_activation) {
    __syncwarp();
    store_lines<S, W>(layer.pre_activation + first * out, lines, rows, out);
    __syncwarp();
  }
#pragma unroll
  for (int n = 0; n < W / 16; n++) {
#pragma unroll
    for (int m = 0; m < fragments; m++) {
#pragma unroll
      for (int i = 0; i < 4; i++) x[m][n][i] = next[m][n][i];
      if (layer.output && n * 16 < out) put<S, W>(lines, x[m][n], m, n);
    }
  }
  if (layer.output) {
    __syncwarp();
    store_lines<S, W>(layer.output + first * out, lines, rows, out);
    __syncwarp();
  }
}

template <class S, int W, class Kinds>
__global__ void __launch_bounds__(MmaFused<W>::forward_threads, MmaFused<W>::forward_blocks)
    mma_fused_forward(const FusedNetwork<S> p) {
  constexpr int fragments = MmaFused<W>::forward_fragments, warp_rows = fragments * 16;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile_rows = int(blockDim.x) / 32 * warp_rows;
  S* const memory = dynamic_shared<S>();
  S* const lines = memory + p.weight_elements + warp * warp_rows * W;
  int place = 0;  // of weights that come by turns
  load_first_weights<S, W>(memory, p);
  commit_copies();
  const int tiles = int((p.rows + tile_rows - 1) / tile_rows);
#pragma unroll 1
  for (int tile = int(blockIdx.x); tile < tiles; tile += int(gridDim.x)) {
    const int64_t first = int64_t(tile) * tile_rows + warp * warp_rows;
    const int rows = rows_inside(first, p.rows, warp_rows);
    load_lines<S, W>(lines, p.input, first, rows, warp_rows, p.layer[0].in_features, lane, 32);
    commit_copies();
    wait_for_copies<0>();
    __syncwarp();
    // For the weights of all layers, which other threads copied too.
    if (p.slots == 0 && tile == int(blockIdx.x)) __syncthreads();
    Fragment x[fragments][W / 16];
#pragma unroll
    for (int n = 0; n < W / 16; n++) {
      if (n * 16 >= padded(p.layer[0].in_features)) break;
#pragma unroll
      for (int m = 0; m < fragments; m++) get<S, W>(x[m][n], lines, m, n);
    }
    __syncwarp();
#pragma unroll 1
    for (int l = 0; l < p.layers; l++) {
      const S* const weights = weights_of<S, W>(memory, p, l, tile + int(gridDim.x) < tiles, place);
      forward_layer<S, W, Kinds>(x, p.layer[l], weights, lines, first, rows);
    }
  }
  wait_for_copies<0>();
}

}  // namespace fastmlp::cuda

// Backward of narrow float16 and bfloat16 networks on tensor cores, all layers in one launch. A warp owns rows, whose
// gradient goes down through the layers in registers; for the gradients of weights, which sum over rows, the warps
// share gradients and inputs in shared memory and own a part of the sums each. Launched by products.cuh, which launches
// sum_fused (rows.cuh) after it: the sums of different blocks are not added here.
#pragma once

#include "fragments.cuh"

namespace fastmlp::cuda {

// The tile of rows that a block works on, as one of its warps sees it. In shared memory lie the gradients of all rows,
// and behind them `stages` tiles of layers' inputs.
template <class S, int W> struct BackwardTile {
  static constexpr int fragments = MmaFused<W>::backward_fragments, warp_rows = fragments * 16;
  static constexpr int stages = MmaFused<W>::stages;
  S* grads;
  int64_t first;  // of the warp's rows in the batch
  int rows;       // of the warp that exist

  // Rows of all warps. Narrow networks always have all warps, so that it is a constant for them.
  static __device__ __forceinline__ int size() {
    return W > 64 ? int(blockDim.x) / 32 * warp_rows : MmaFused<W>::backward_threads / 32 * warp_rows;
  }
  // Where the warp's own rows begin in the gradients, and in an input.
  static __device__ __forceinline__ int own() { return int(threadIdx.x) / 32 * warp_rows * W; }
  // The input of layer l, which is what the layer below saved. Behind the last layer there is one more: its output.
  __device__ __forceinline__ S* input_of(int l) const { return grads + (1 + l % stages) * size() * W; }
};

template <class S> __device__ __forceinline__ bool needs_input(const FusedNetwork<S>& p, int l) {
  return p.layer[l].weight_sums || (l > p.lowest && p.layer[l - 1].differentiates);
}

// Begins to copy the warp's rows of the input of layer l.
template <class S, int W>
__device__ __forceinline__ void load_input(const FusedNetwork<S>& p, int l, const BackwardTile<S, W>& tile) {
  load_lines<S, W>(tile.input_of(l) + tile.own(), l == 0 ? p.input : p.layer[l - 1].saved, tile.first, tile.rows,
                   tile.warp_rows, l >= p.layers ? p.layer[p.layers - 1].out_features : p.layer[l].in_features,
                   int(threadIdx.x) % 32, 32);
}

// values *= act'(saved), where `saved` is block n of the warp's lines.
template <class S, int W, class Kinds, int fragments>
__device__ __forceinline__ void differentiate(float (&values)[fragments][2][4], const FusedLayer<S>& layer,
                                              const S* lines, int n) {
  with_activation(layer.activation.kind, Kinds{}, [&](auto activation) {
    using A = decltype(activation);
    if constexpr (!std::is_same_v<A, Identity>) {
      each_fragment<!is_light<Kinds>>(values, [&](float (&value)[2][4], int m) {
        Fragment packed;
        float saved[2][4];
        get<S, W>(packed, lines, m, n);
        unpack<S>(saved, packed);
#pragma unroll
        for (int i = 0; i < 8; i++)
          value[i / 4][i % 4] = A::template gradient<ScalarMath<float>>(value[i / 4][i % 4], saved[i / 4][i % 4],
                                                                        layer.activation.scalars);
      });
    }
  });
}

// The same for Relu: zeroes the gradient where `saved` is not above zero.
template <class S, int W>
__device__ __forceinline__ void differentiate_relu(Fragment& grad, const S* lines, int m, int n) {
  Fragment saved;
  get<S, W>(saved, lines, m, n);
#pragma unroll
  for (int i = 0; i < 4; i++) grad[i] &= above_zero_mask(saved[i], S{});
}

// grad = the gradient of the last layer's pre-activation for the warp's rows, also in shared memory. Behind it the
// input of the last layer is on its way, if there is a second stage.
template <class S, int W, class Kinds, int fragments>
__device__ __forceinline__ void load_last_gradient(Fragment (&grad)[fragments][W / 16], const FusedNetwork<S>& p,
                                                   const BackwardTile<S, W>& tile) {
  constexpr bool rolled = !is_light<Kinds>;
  const FusedLayer<S>& last = p.layer[p.layers - 1];
  S* const own = tile.grads + tile.own();
  load_lines<S, W>(own, p.grad, tile.first, tile.rows, tile.warp_rows, last.out_features, int(threadIdx.x) % 32, 32);
  if (last.differentiates) load_input(p, p.layers, tile);
  commit_copies();
  if (tile.stages == 2 && needs_input(p, p.layers - 1)) load_input(p, p.layers - 1, tile);
  commit_copies();
  wait_for_copies<BackwardTile<S, W>::stages == 2 ? 1 : 0>();
  __syncwarp();
#pragma unroll(rolled ? 1 : W / 16)
  for (int n = 0; n < W / 16; n++) {
    if (n * 16 >= padded(last.out_features)) break;
    Fragment packed[fragments];
#pragma unroll
    for (int m = 0; m < fragments; m++) get<S, W>(packed[m], own, m, n);
    if (last.differentiates) {
      const S* const saved = tile.input_of(p.layers) + tile.own();
      if constexpr (rolled) {
        float values[fragments][2][4];
#pragma unroll
        for (int m = 0; m < fragments; m++) unpack<S>(values[m], packed[m]);
        differentiate<S, W, Kinds>(values, last, saved, n);
#pragma unroll
        for (int m = 0; m < fragments; m++) pack<S>(packed[m], values[m]);
      }
#pragma unroll
      for (int m = 0; m < fragments; m++) {
        if (!rolled) differentiate_relu<S, W>(packed[m], saved, m, n);
        put<S, W>(own, packed[m], m, n);
      }
    }
#pragma unroll
    for (int m = 0; m < fragments; m++) keep_block(grad[m], packed[m], n);
  }
  __syncwarp();
}

// next = the gradient of the pre-activation of the layer below, or for the first layer of the input.
template <class S, int W, class Kinds, int fragments>
__device__ __forceinline__ void dgrad_layer(Fragment (&next)[fragments][W / 16],
                                            const Fragment (&grad)[fragments][W / 16], const FusedNetwork<S>& p, int l,
                                            const S* weights, const BackwardTile<S, W>& tile) {
  constexpr bool rolled = !is_light<Kinds>;
  const int in = p.layer[l].in_features, out = p.layer[l].out_features;
  const S* const saved = tile.input_of(l) + tile.own();
#pragma unroll(rolled ? 1 : W / 16)
  for (int n = 0; n < W / 16; n++) {
    if (n * 16 >= in) break;
    float sums[fragments][2][4] = {};
    multiply_block<S, W, true>(sums, grad, weights, n, out);
    const bool differentiates = l > 0 && p.layer[l - 1].differentiates;
    if (rolled && differentiates) differentiate<S, W, Kinds>(sums, p.layer[l - 1], saved, n);
    mask(sums, n, in, tile.rows);
#pragma unroll
    for (int m = 0; m < fragments; m++) {
      Fragment packed;
      pack<S>(packed, sums[m]);
      if (!rolled && differentiates) differentiate_relu<S, W>(packed, saved, m, n);
      keep_block(next[m], packed, n);
    }
  }
  clear_blocks(next, in);
}

// Replaces the pre-activations that layer l - 1 saved by what the activation makes of them: the input of layer l.
template <class S, int W, class Kinds>
__device__ __forceinline__ void activate_input(const FusedNetwork<S>& p, int l, const BackwardTile<S, W>& tile) {
  const ActivationSpec& spec = p.layer[l - 1].activation;
  S* const lines = tile.input_of(l) + tile.own();
  with_activation(spec.kind, Kinds{}, [&](auto activation) {
    using A = decltype(activation);
#pragma unroll 1
    for (int block = 0; block < (p.layer[l].in_features + 15) / 16 * tile.fragments; block++) {
      Fragment packed;
      float values[2][4];
      get<S, W>(packed, lines, block % tile.fragments, block / tile.fragments);
      unpack<S>(values, packed);
#pragma unroll
      for (int i = 0; i < 8; i++)
        values[i / 4][i % 4] = A::template value<ScalarMath<float>>(values[i / 4][i % 4], spec.scalars);
      pack<S>(packed, values);
      put<S, W>(lines, packed, block % tile.fragments, block / tile.fragments);
    }
  });
}

// A warp's part of the gradient of a layer's weights.
template <int W> using WeightPart = float[MmaFused<W>::part_rows / 16][MmaFused<W>::part_columns / 8][4];

struct PartPlace {
  int row, column;
};

template <int W> constexpr int weight_parts = W / MmaFused<W>::part_rows * (W / MmaFused<W>::part_columns);

template <int W> __device__ __forceinline__ PartPlace place_of_part(int part) {
  constexpr int across = W / MmaFused<W>::part_columns;
  return {part / across * MmaFused<W>::part_rows, part % across * MmaFused<W>::part_columns};
}

// Stores a part to its place in a block's sums, [out_features, in_features], or loads it from there.
template <int W, bool stores>
__device__ __forceinline__ void move_part(WeightPart<W>& part, PartPlace at, float* sums, int out, int in) {
  const int lane = threadIdx.x % 32;
  const bool pairs = in % 2 == 0;
#pragma unroll
  for (int i = 0; i < MmaFused<W>::part_rows / 16; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = at.row + i * 16 + lane / 4 + half * 8;
#pragma unroll
      for (int j = 0; j < MmaFused<W>::part_columns / 8; j++) {
        const int column = at.column + j * 8 + lane % 4 * 2;
        float* const place = sums + row * in + column;
        float* const values = part[i][j] + half * 2;
        const int inside = row < out ? in - column : 0;
        if (pairs && inside > 0) {
          auto& pair = *reinterpret_cast<Vec<float, 2>*>(place);
          if constexpr (stores) {
            pair = {values[0], values[1]};
          } else {
            const Vec<float, 2> found = pair;
            values[0] = found.element[0];
            values[1] = found.element[1];
          }
        } else {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            if constexpr (stores) {
              if (e < inside) place[e] = values[e];
            } else {
              values[e] = e < inside ? place[e] : 0;
            }
          }
        }
      }
    }
  }
}

// part += grad^T input over the rows of a tile. If bias_sums is not null, parts at the left edge also write the sums of
// grad's columns there, which are a product with a column of ones; `add` adds to what is there.
template <class S, int W>
__device__ __forceinline__ void add_part(WeightPart<W>& part, PartPlace at, float* bias_sums, bool add, const S* grads,
                                         const S* inputs, int tile_rows, int out) {
  using Lines = AcrossLines<S, W>;
  constexpr int rows = MmaFused<W>::part_rows / 16, columns = MmaFused<W>::part_columns / 16;
  const int start_a = Lines::start_of_a(at.row), start_b = Lines::start_of_b(at.column), lane = threadIdx.x % 32;
  const bool sums_bias = bias_sums && at.column == 0;
  const uint32_t ones = narrow_pair(1, 1, S{});
  float bias[rows][4] = {};
#pragma unroll 1
  for (int k = 0; k < tile_rows; k += 16) {
    Fragment a[rows], b[columns];
#pragma unroll
    for (int i = 0; i < rows; i++) load_matrices<true>(a[i], grads + Lines::place(start_a, i, k));
#pragma unroll
    for (int j = 0; j < columns; j++) load_matrices<true>(b[j], inputs + Lines::place(start_b, j, k));
#pragma unroll
    for (int i = 0; i < rows; i++) {
#pragma unroll
      for (int j = 0; j < 2 * columns; j++)
        multiply_add(part[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], S{});
      if (sums_bias) multiply_add(bias[i], a[i], ones, ones, S{});
    }
  }
  if (!sums_bias || lane % 4 > 0) return;
#pragma unroll
  for (int i = 0; i < rows; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = at.row + i * 16 + lane / 4 + half * 8;
      if (row >= out) continue;
      bias_sums[row] = add ? bias_sums[row] + bias[i][half * 2] : bias[i][half * 2];
    }
  }
}
// Adds the tile's rows to the block's sums of layer l: to those that registers hold, or to those in global memory,
// which the block's first tile begins.
template <class S, int W, int holds, int places>
__device__ __forceinline__ void add_sums(WeightPart<W> (&held)[places], const FusedNetwork<S>& p, int l,
                                         const BackwardTile<S, W>& tile, bool is_first) {
  const FusedLayer<S>& layer = p.layer[l];
  const int in = layer.in_features, out = layer.out_features, warp = threadIdx.x / 32;
  const S* const input = tile.input_of(l);
  const int64_t block = int64_t(blockIdx.x) * p.sums_stride;
  float* const bias_sums = layer.bias_sums ? layer.bias_sums + block : nullptr;
  each_number<holds>([&](auto h) {
    const PartPlace at = place_of_part<W>(warp);
    if (layer.held == h && at.row < out && at.column < in)
      add_part<S, W>(held[h], at, bias_sums, !is_first, tile.grads, input, tile.size(), out);
  });
  if (layer.held >= 0 || !(layer.weight_sums || layer.bias_sums)) return;
#pragma unroll 1
  for (int part = warp; part < weight_parts<W>; part += int(blockDim.x) / 32) {
    const PartPlace at = place_of_part<W>(part);
    if (at.row >= out || at.column >= in) continue;
    WeightPart<W> sums = {};
    if (!is_first && layer.weight_sums) move_part<W, false>(sums, at, layer.weight_sums + block, out, in);
    add_part<S, W>(sums, at, bias_sums, !is_first, tile.grads, input, tile.size(), out);
    if (layer.weight_sums) move_part<W, true>(sums, at, layer.weight_sums + block, out, in);
  }
}

template <class S, int W, int holds, int places>
__device__ __forceinline__ void store_held(WeightPart<W> (&held)[places], const FusedNetwork<S>& p) {
  each_number<holds>([&](auto h) {
    for (int l = p.lowest; l < p.layers; l++) {
      const FusedLayer<S>& layer = p.layer[l];
      if (layer.held == h)
        move_part<W, true>(held[h], place_of_part<W>(threadIdx.x / 32), layer.weight_sums + blockIdx.x * p.sums_stride,
                           layer.out_features, layer.in_features);
    }
  });
}

// grad = next, also in shared memory, and in the caller's if it is that of the input.
template <class S, int W, int fragments>
__device__ __forceinline__ void go_down(Fragment (&grad)[fragments][W / 16], const Fragment (&next)[fragments][W / 16],
                                        const FusedNetwork<S>& p, int l, const BackwardTile<S, W>& tile) {
  const int in = p.layer[l].in_features;
  S* const own = tile.grads + tile.own();
#pragma unroll
  for (int n = 0; n < W / 16; n++) {
#pragma unroll
    for (int m = 0; m < fragments; m++) {
#pragma unroll
      for (int i = 0; i < 4; i++) grad[m][n][i] = next[m][n][i];
      if (n * 16 < in) put<S, W>(own, grad[m][n], m, n);
    }
  }
  if (l == 0) {
    __syncwarp();
    store_lines<S, W>(p.grad_input + tile.first * in, own, tile.rows, in);
    __syncwarp();
  }
}

// A block takes every gridDim.x-th tile of rows and adds up its own sums of weights and biases: of a few layers in
// registers until the end, of others in global memory, tile after tile.
template <class S, int W, class Kinds>
__global__ void __launch_bounds__(MmaFused<W>::backward_threads, MmaFused<W>::backward_blocks)
    mma_fused_backward(const FusedNetwork<S> p) {
  using Tile = BackwardTile<S, W>;
  constexpr int fragments = Tile::fragments, stages = Tile::stages, holds = held_parts<W, Kinds>;
  S* const memory = dynamic_shared<S>();
  // The last layer down to which the gradient goes on through weights.
  const int last_dgrad = p.grad_input ? 0 : p.lowest + 1;
  WeightPart<W> held[holds > 0 ? holds : 1] = {};
  int place = 0;  // of weights that come by turns
  if (p.slots == 0) {
    for (int l = last_dgrad; l < p.layers; l++) load_weights<S, W, false>(memory + p.layer[l].place, p.layer[l]);
  } else if (last_dgrad < p.layers) {
    load_weights<S, W, false>(memory, p.layer[p.layers - 1]);
  }
  commit_copies();
  const int tiles = int((p.rows + Tile::size() - 1) / Tile::size());
#pragma unroll 1
  for (int number = int(blockIdx.x); number < tiles; number += int(gridDim.x)) {
    const int64_t first = int64_t(number) * Tile::size() + int(threadIdx.x) / 32 * Tile::warp_rows;
    const Tile tile{memory + p.weight_elements, first, rows_inside(first, p.rows, Tile::warp_rows)};
    Fragment grad[fragments][W / 16];
    load_last_gradient<S, W, Kinds>(grad, p, tile);
#pragma unroll 1
    for (int l = p.layers - 1; l >= p.lowest; l--) {
      const FusedLayer<S>& layer = p.layer[l];
      const bool goes_on = l >= last_dgrad, activates = layer.weight_sums && l > 0 && !p.layer[l - 1].keeps_output;
      if (stages == 1 && needs_input(p, l)) load_input(p, l, tile);
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      const S* weights = memory + layer.place;
      // What the next layer needs besides.
      if (stages == 2 && l > p.lowest && needs_input(p, l - 1)) load_input(p, l - 1, tile);
      const int next_dgrad = l > last_dgrad ? l - 1 : number + int(gridDim.x) < tiles ? p.layers - 1 : -1;
      if (p.slots > 0 && goes_on) {
        weights = memory + place;
        if (p.slots == 2) {
          place = p.weight_elements / 2 - place;
          if (next_dgrad >= 0) load_weights<S, W, false>(memory + place, p.layer[next_dgrad]);
        }
      }
      commit_copies();
      Fragment next[fragments][W / 16];
      if (goes_on) dgrad_layer<S, W, Kinds>(next, grad, p, l, weights, tile);
      if constexpr (!is_light<Kinds>) {
        if (activates) activate_input<S, W, Kinds>(p, l, tile);
      }
      if (activates || p.slots == 1) __syncthreads();
      if (p.slots == 1 && goes_on && next_dgrad >= 0) load_weights<S, W, false>(memory, p.layer[next_dgrad]);
      commit_copies();
      add_sums<S, W, holds>(held, p, l, tile, number < int(gridDim.x));
      __syncthreads();
      if (!goes_on) break;
      go_down<S, W>(grad, next, p, l, tile);
    }
  }
  wait_for_copies<0>();
  store_held<S, W, holds>(held, p);
}

}  // namespace fastmlp::cuda

// Narrow networks on tensor cores, depth-fused: float16 and bfloat16. A warp owns rows and takes them through all
// layers in registers: the sums that one layer's products leave, activated and rounded, lie as the next one's operand
// A. Shared memory holds weights, and rows on their way in and out. Launched by products.cuh.
#pragma once

#include <utility>

#include "fused.h"
#include "mma.cuh"

namespace fastmlp::cuda {

// Activations of so little code that it may stand in a kernel once for each register: layers are then unrolled, and
// what they leave stays where it is. Other networks take a kernel that loops. A prefix, for its numbering. Relu comes
// with the rounding there, and its derivative is a mask.
using LightActivations = ActivationList<Identity, Relu>;
template <class Kinds> constexpr bool is_light = Kinds::size == LightActivations::size;

// The code of the others takes registers.
template <int W, class Kinds> constexpr int held_parts = MmaFused<W>::held - (is_light<Kinds> ? 0 : 1);

// Lines of features in shared memory, [..., W], as operands whose terms lie along a line, or across lines.
template <class S, int W> using AlongLines = OperandTile<S, W, W, false>;
template <class S, int W> using AcrossLines = OperandTile<S, W, W, true>;

// A warp's fragment of 16 rows and features, as mma.m16n8k16 takes it for A: of lane l, rows l / 4 and l / 4 + 8 by
// turns, features 2 (l % 4) and the next, then the same 8 features on.
using Fragment = uint32_t[4];

template <class S> __device__ __forceinline__ void unpack(float (&to)[2][4], const Fragment& from) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    to[i / 2][i % 2 * 2] = widen(S{uint16_t(from[i])});
    to[i / 2][i % 2 * 2 + 1] = widen(S{uint16_t(from[i] >> 16)});
  }
}

template <class S> __device__ __forceinline__ void pack(Fragment& to, const float (&from)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) to[i] = narrow_pair(from[i / 2][i % 2 * 2], from[i / 2][i % 2 * 2 + 1], S{});
}

template <class S> __device__ __forceinline__ void pack_above_zero(Fragment& to, const float (&from)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) to[i] = narrow_pair_above_zero(from[i / 2][i % 2 * 2], from[i / 2][i % 2 * 2 + 1], S{});
}

// Of lines, fragment `m` of 16 lines and `n` of 16 features.
template <class S, int W> __device__ __forceinline__ void put(S* lines, const Fragment& fragment, int m, int n) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    S* const place = lines + AlongLines<S, W>::offset(m * 16 + lane / 4 + i % 2 * 8, n * 2 + i / 2) + lane % 4 * 2;
    *reinterpret_cast<uint32_t*>(place) = fragment[i];
  }
}

template <class S, int W> __device__ __forceinline__ void get(Fragment& fragment, const S* lines, int m, int n) {
  using Lines = AlongLines<S, W>;
  load_matrices<false>(fragment, lines + Lines::place(Lines::start_of_a(0), m, n * 16));
}

// Zeros past the features, where a product of zero with infinity may have left NaN, and past the rows.
template <int fragments>
__device__ __forceinline__ void mask(float (&values)[fragments][2][4], int n, int features, int rows) {
  if (n * 16 + 16 <= features && rows >= fragments * 16) return;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < fragments; m++) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const bool inside =
          n * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2 < features && m * 16 + lane / 4 + i / 2 % 2 * 8 < rows;
      if (!inside) values[m][i / 4][i % 4] = 0;
    }
  }
}

// f(one of the fragments' values, its number) for each; in a loop, if `rolled`, that turns the registers.
template <bool rolled, int fragments, class T, class F>
__device__ __forceinline__ void each_fragment(T (&values)[fragments][2][4], const F& f) {
  if constexpr (rolled && fragments == 2) {
#pragma unroll 1
    for (int m = 0; m < 2; m++) {
      f(values[0], m);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const T first = values[0][i / 4][i % 4];
        values[0][i / 4][i % 4] = values[1][i / 4][i % 4];
        values[1][i / 4][i % 4] = first;
      }
    }
  } else {
#pragma unroll
    for (int m = 0; m < fragments; m++) f(values[m], m);
  }
}

// f(0) to f(count - 1) with numbers that are types: what they index stays in registers, whoever compiles.
template <int... number, class F>
__device__ __forceinline__ void each_number(std::integer_sequence<int, number...>, const F& f) {
  (f(std::integral_constant<int, number>()), ...);
}
template <int count, class F> __device__ __forceinline__ void each_number(const F& f) {
  each_number(std::make_integer_sequence<int, count>(), f);
}

// f(the number of 16s that hold the padded features).
template <int W, class F> __device__ __forceinline__ void with_blocks(int features, const F& f) {
  if (features <= 16) return f(std::integral_constant<int, 1>());
  if (features <= 32) return f(std::integral_constant<int, 2>());
  if constexpr (W > 64) {
    if (features > 64) return f(std::integral_constant<int, 8>());
  }
  f(std::integral_constant<int, 4>());
}

// A lane's or thread's part of lines: chunks, or elements, of a power of two for each line, the same of every step'th.
struct LinePart {
  int line, item, step;
  __device__ __forceinline__ LinePart(int thread, int threads, int items) {
    int shift = 0;
    while (1 << shift < items) shift++;
    line = thread >> shift;
    item = thread & ((1 << shift) - 1);
    step = threads >> shift;
  }
};

// `lines` lines of rows of x from row `first` on, of which `rows` are inside; zeros past these and past the features,
// up to the padded ones. All of `threads` threads call it; what they copy is there after the wait for their groups.
template <class S, int W>
__device__ __forceinline__ void load_lines(S* to, const StridedMatrix<S>& x, int64_t first, int rows, int lines,
                                           int features, int thread, int threads) {
  const LinePart part(thread, threads, padded(features) / chunk_elements);
  const int left = features - part.item * chunk_elements;
  const S* from = x.data + (first + part.line) * x.row_stride + part.item * chunk_elements * x.column_stride;
  const int64_t hop = part.step * x.row_stride;
  const bool vectors =
      x.column_stride == 1 && x.row_stride % chunk_elements == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  const int bytes = left >= chunk_elements ? 16 : left > 0 ? left * int(sizeof(S)) : 0;
#pragma unroll 1
  for (int line = part.line; line < lines; line += part.step, from += hop) {
    S* const place = to + AlongLines<S, W>::offset(line, part.item);
    const bool inside = line < rows;
    if (vectors) {
      copy_async16(place, inside && left > 0 ? from : x.data, inside ? bytes : 0);
      continue;
    }
    Vec<S, chunk_elements> gathered = {};
#pragma unroll
    for (int e = 0; e < chunk_elements; e++) {
      if (inside && e < left) gathered.element[e] = from[e * x.column_stride];
    }
    *reinterpret_cast<Vec<S, chunk_elements>*>(place) = gathered;
  }
}

// A warp's lines to rows without gaps, of which `to` is the first.
template <class S, int W> __device__ __forceinline__ void store_lines(S* to, const S* lines, int rows, int features) {
  const int lane = threadIdx.x % 32;
  using Lines = AlongLines<S, W>;
  if (features % chunk_elements == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    const LinePart part(lane, 32, padded(features) / chunk_elements);
    if (part.item * chunk_elements >= features) return;
    for (int line = part.line; line < rows; line += part.step) {
      *reinterpret_cast<Vec<S, chunk_elements>*>(to + line * features + part.item * chunk_elements) =
          *reinterpret_cast<const Vec<S, chunk_elements>*>(lines + Lines::offset(line, part.item));
    }
    return;
  }
  const LinePart part(lane, 32, features < 32 ? features : 32);
  for (int line = part.line; line < rows; line += part.step) {
    for (int feature = part.item; feature < features; feature += 32)
      to[line * features + feature] = lines[Lines::offset(line, feature / chunk_elements) + feature % chunk_elements];
  }
}

// A layer's weights as lines, one for each output and zeros up to the padded ones, and behind them, for forward, its
// biases in float32.
template <class S, int W, bool with_bias>
__device__ __forceinline__ void load_weights(S* to, const FusedLayer<S>& layer) {
  const int out = layer.out_features, lines = padded(out);
  load_lines<S, W>(to, layer.weight, 0, out, lines, layer.in_features, int(threadIdx.x), int(blockDim.x));
  if constexpr (with_bias) {
    auto* const bias = reinterpret_cast<float*>(to + lines * W);
    for (int i = int(threadIdx.x); i < lines; i += int(blockDim.x))
      bias[i] = layer.bias && i < out ? widen(layer.bias[i * layer.bias_stride]) : 0;
  }
}

// sums += a b, where b are 16 columns of weights: fragment n of theirs along lines (forward) or across them (dgrad).
template <class S, int W, bool across, int fragments>
__device__ __forceinline__ void multiply_block(float (&sums)[fragments][2][4], const Fragment (&a)[fragments][W / 16],
                                               const S* weights, int n, int depth) {
  using Lines = std::conditional_t<across, AcrossLines<S, W>, AlongLines<S, W>>;
  const int start = Lines::start_of_b(0);
  with_blocks<W>(depth, [&](auto blocks) {
#pragma unroll
    for (int k = 0; k < blocks; k++) {
      Fragment columns;
      load_matrices<across>(columns, weights + Lines::place(start, n, k * 16));
#pragma unroll
      for (int m = 0; m < fragments; m++) {
#pragma unroll
        for (int j = 0; j < 2; j++) multiply_add(sums[m][j], a[m][k], columns[2 * j], columns[2 * j + 1], S{});
      }
    }
  });
}

// to[n] = fragment, where n may only be known at run time.
template <int blocks>
__device__ __forceinline__ void keep_block(Fragment (&to)[blocks], const Fragment& fragment, int n) {
#pragma unroll
  for (int block = 0; block < blocks; block++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (block == n) to[block][i] = fragment[i];
    }
  }
}

// Fragments past a layer's features that the next product takes, up to the padded ones.
template <int fragments, int blocks>
__device__ __forceinline__ void clear_blocks(Fragment (&x)[fragments][blocks], int features) {
#pragma unroll
  for (int n = 0; n < blocks; n++) {
    if (n * 16 < features) continue;
#pragma unroll
    for (int m = 0; m < fragments; m++) {
#pragma unroll
      for (int i = 0; i < 4; i++) x[m][n][i] = 0;
    }
  }
}

template <class S, int W, class Kinds>
__global__ void __launch_bounds__(MmaFused<W>::forward_threads, MmaFused<W>::forward_blocks)
    mma_fused_forward(const FusedNetwork<S> p) {
  constexpr int fragments = MmaFused<W>::forward_fragments, warp_rows = fragments * 16;
  constexpr bool rolled = !is_light<Kinds>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile_rows = int(blockDim.x) / 32 * warp_rows;
  S* const memory = dynamic_shared<S>();
  S* const lines = memory + p.weight_elements + warp * warp_rows * W;
  int place = 0;  // of weights that come by turns
  if (p.slots == 0) {
    for (int l = 0; l < p.layers; l++) load_weights<S, W, true>(memory + p.layer[l].place, p.layer[l]);
  } else if (p.slots == 2) {
    load_weights<S, W, true>(memory, p.layer[0]);
  }
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
    // For the weights of all layers.
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
      const FusedLayer<S>& layer = p.layer[l];
      const int in = layer.in_features, out = layer.out_features;
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
        if (!last || tile + int(gridDim.x) < tiles) load_weights<S, W, true>(memory + place, p.layer[last ? 0 : l + 1]);
        commit_copies();
      }
      const auto* const bias = reinterpret_cast<const float*>(weights + padded(out) * W);
      Fragment next[fragments][W / 16];
#pragma unroll(rolled ? 1 : W / 16)
      for (int n = 0; n < W / 16; n++) {
        if (n * 16 >= out) break;
        float sums[fragments][2][4];
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const auto pair = *reinterpret_cast<const Vec<float, 2>*>(bias + n * 16 + j * 8 + lane % 4 * 2);
#pragma unroll
          for (int m = 0; m < fragments; m++) {
#pragma unroll
            for (int e = 0; e < 4; e++) sums[m][j][e] = pair.element[e % 2];
          }
        }
        multiply_block<S, W, false>(sums, x, weights, n, in);
        if constexpr (rolled) {
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
            each_fragment<rolled>(sums, [&](float (&values)[2][4], int) {
#pragma unroll
              for (int i = 0; i < 8; i++)
                values[i / 4][i % 4] =
                    A::template value<ScalarMath<float>>(values[i / 4][i % 4], layer.activation.scalars);
            });
          });
        }
        mask(sums, n, out, warp_rows);
        Fragment packed[fragments];
#pragma unroll
        for (int m = 0; m < fragments; m++) {
          if (!rolled && layer.differentiates) {
            pack_above_zero<S>(packed[m], sums[m]);
          } else {
            pack<S>(packed[m], sums[m]);
          }
          keep_block(next[m], packed[m], n);
        }
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
  }
  wait_for_copies<0>();
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

// Between a part and its place in the sums of a block, [out_features, in_features].
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

// part += grad^T input over the rows of a tile, and (+)= to bias_sums, if not null, the sums of grad's columns, which
// parts at the left edge get from a column of ones.
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

// A block takes every gridDim.x-th tile of rows and adds up its own sums of weights and biases: of a few layers in
// registers until the end, of others in global memory, tile after tile.
template <class S, int W, class Kinds>
__global__ void __launch_bounds__(MmaFused<W>::backward_threads, MmaFused<W>::backward_blocks)
    mma_fused_backward(const FusedNetwork<S> p) {
  using Shape = MmaFused<W>;
  constexpr int fragments = Shape::backward_fragments, warp_rows = fragments * 16, stages = Shape::stages;
  constexpr bool rolled = !is_light<Kinds>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tile_rows = W > 64 ? int(blockDim.x) / 32 * warp_rows : Shape::backward_threads / 32 * warp_rows;
  const int own = warp * warp_rows * W;
  S* const memory = dynamic_shared<S>();
  S* const grads = memory + p.weight_elements;
  // Of layer l, whose input is what the layer below saved; that of the last is the input of one more.
  const auto input_of = [&](int l) { return grads + (1 + l % stages) * tile_rows * W; };
  // The last layer down to which the gradient goes on through weights.
  const int last_dgrad = p.grad_input ? 0 : p.lowest + 1;
  const auto needs_input = [&](int l) {
    return p.layer[l].weight_sums || (l > p.lowest && p.layer[l - 1].differentiates);
  };
  const auto load_input = [&](int l, int64_t first, int rows) {
    load_lines<S, W>(input_of(l) + own, l == 0 ? p.input : p.layer[l - 1].saved, first, rows, warp_rows,
                     l >= p.layers ? p.layer[p.layers - 1].out_features : p.layer[l].in_features, lane, 32);
  };
  // values *= act'(saved), saved being fragment (m, n) of lines
  const auto differentiate = [&](float (&values)[fragments][2][4], const FusedLayer<S>& layer, const S* lines, int n) {
    with_activation(layer.activation.kind, Kinds{}, [&](auto activation) {
      using A = decltype(activation);
      if constexpr (!std::is_same_v<A, Identity>) {
        each_fragment<rolled>(values, [&](float (&value)[2][4], int m) {
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
  };
  constexpr int holds = held_parts<W, Kinds>;
  WeightPart<W> held[holds > 0 ? holds : 1] = {};
  // The same of Relu.
  const auto drop = [&](Fragment& fragment, const S* lines, int m, int n) {
    Fragment saved;
    get<S, W>(saved, lines, m, n);
#pragma unroll
    for (int i = 0; i < 4; i++) fragment[i] &= above_zero_mask(saved[i], S{});
  };
  int place = 0;  // of weights that come by turns
  if (p.slots == 0) {
    for (int l = last_dgrad; l < p.layers; l++) load_weights<S, W, false>(memory + p.layer[l].place, p.layer[l]);
  } else if (last_dgrad < p.layers) {
    load_weights<S, W, false>(memory, p.layer[p.layers - 1]);
  }
  commit_copies();
  const int tiles = int((p.rows + tile_rows - 1) / tile_rows);
#pragma unroll 1
  for (int tile = int(blockIdx.x); tile < tiles; tile += int(gridDim.x)) {
    const int64_t first = int64_t(tile) * tile_rows + warp * warp_rows;
    const int rows = rows_inside(first, p.rows, warp_rows);
    const int last_features = p.layer[p.layers - 1].out_features;
    load_lines<S, W>(grads + own, p.grad, first, rows, warp_rows, last_features, lane, 32);
    if (p.layer[p.layers - 1].differentiates) load_input(p.layers, first, rows);
    commit_copies();
    if (stages == 2 && needs_input(p.layers - 1)) load_input(p.layers - 1, first, rows);
    commit_copies();
    wait_for_copies<stages == 2 ? 1 : 0>();
    __syncwarp();
    Fragment grad[fragments][W / 16];
#pragma unroll(rolled ? 1 : W / 16)
    for (int n = 0; n < W / 16; n++) {
      if (n * 16 >= padded(last_features)) break;
      Fragment packed[fragments];
#pragma unroll
      for (int m = 0; m < fragments; m++) get<S, W>(packed[m], grads + own, m, n);
      if (p.layer[p.layers - 1].differentiates) {
        const S* const saved = input_of(p.layers) + own;
        if constexpr (rolled) {
          float values[fragments][2][4];
#pragma unroll
          for (int m = 0; m < fragments; m++) unpack<S>(values[m], packed[m]);
          differentiate(values, p.layer[p.layers - 1], saved, n);
#pragma unroll
          for (int m = 0; m < fragments; m++) pack<S>(packed[m], values[m]);
        }
#pragma unroll
        for (int m = 0; m < fragments; m++) {
          if (!rolled) drop(packed[m], saved, m, n);
          put<S, W>(grads + own, packed[m], m, n);
        }
      }
#pragma unroll
      for (int m = 0; m < fragments; m++) keep_block(grad[m], packed[m], n);
    }
    __syncwarp();
#pragma unroll 1
    for (int l = p.layers - 1; l >= p.lowest; l--) {
      const FusedLayer<S>& layer = p.layer[l];
      const int in = layer.in_features, out = layer.out_features;
      const bool goes_on = l >= last_dgrad, converts = layer.weight_sums && l > 0 && !p.layer[l - 1].keeps_output;
      S* const input = input_of(l);
      if (stages == 1 && needs_input(l)) load_input(l, first, rows);
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      const S* weights = memory + layer.place;
      // What the next layer needs besides.
      if (stages == 2 && l > p.lowest && needs_input(l - 1)) load_input(l - 1, first, rows);
      const int next_dgrad = l > last_dgrad ? l - 1 : tile + int(gridDim.x) < tiles ? p.layers - 1 : -1;
      if (p.slots > 0 && goes_on) {
        weights = memory + place;
        if (p.slots == 2) {
          place = p.weight_elements / 2 - place;
          if (next_dgrad >= 0) load_weights<S, W, false>(memory + place, p.layer[next_dgrad]);
        }
      }
      commit_copies();
      Fragment next[fragments][W / 16];
      if (goes_on) {
#pragma unroll(rolled ? 1 : W / 16)
        for (int n = 0; n < W / 16; n++) {
          if (n * 16 >= in) break;
          float sums[fragments][2][4] = {};
          multiply_block<S, W, true>(sums, grad, weights, n, out);
          const bool differentiates = l > 0 && p.layer[l - 1].differentiates;
          if (rolled && differentiates) differentiate(sums, p.layer[l - 1], input + own, n);
          mask(sums, n, in, rows);
#pragma unroll
          for (int m = 0; m < fragments; m++) {
            Fragment packed;
            pack<S>(packed, sums[m]);
            if (!rolled && differentiates) drop(packed, input + own, m, n);
            keep_block(next[m], packed, n);
          }
        }
        clear_blocks(next, in);
      }
      if (converts) {
        if constexpr (rolled) {
          with_activation(p.layer[l - 1].activation.kind, Kinds{}, [&](auto activation) {
            using A = decltype(activation);
#pragma unroll 1
            for (int block = 0; block < (in + 15) / 16 * fragments; block++) {
              Fragment packed;
              float values[2][4];
              get<S, W>(packed, input + own, block % fragments, block / fragments);
              unpack<S>(values, packed);
#pragma unroll
              for (int i = 0; i < 8; i++)
                values[i / 4][i % 4] =
                    A::template value<ScalarMath<float>>(values[i / 4][i % 4], p.layer[l - 1].activation.scalars);
              pack<S>(packed, values);
              put<S, W>(input + own, packed, block % fragments, block / fragments);
            }
          });
        }
      }
      if (converts || p.slots == 1) __syncthreads();
      if (p.slots == 1 && goes_on && next_dgrad >= 0) load_weights<S, W, false>(memory, p.layer[next_dgrad]);
      commit_copies();
      const bool add = tile >= int(gridDim.x);
      const int64_t block = int64_t(blockIdx.x) * p.sums_stride;
      float* const bias_sums = layer.bias_sums ? layer.bias_sums + block : nullptr;
      each_number<holds>([&](auto h) {
        const PartPlace at = place_of_part<W>(warp);
        if (layer.held == h && at.row < out && at.column < in)
          add_part<S, W>(held[h], at, bias_sums, add, grads, input, tile_rows, out);
      });
      if (layer.held < 0 && (layer.weight_sums || layer.bias_sums)) {
#pragma unroll 1
        for (int part = warp; part < weight_parts<W>; part += int(blockDim.x) / 32) {
          const PartPlace at = place_of_part<W>(part);
          if (at.row >= out || at.column >= in) continue;
          WeightPart<W> sums = {};
          if (add && layer.weight_sums) move_part<W, false>(sums, at, layer.weight_sums + block, out, in);
          add_part<S, W>(sums, at, bias_sums, add, grads, input, tile_rows, out);
          if (layer.weight_sums) move_part<W, true>(sums, at, layer.weight_sums + block, out, in);
        }
      }
      __syncthreads();
      if (!goes_on) break;
#pragma unroll
      for (int n = 0; n < W / 16; n++) {
#pragma unroll
        for (int m = 0; m < fragments; m++) {
#pragma unroll
          for (int i = 0; i < 4; i++) grad[m][n][i] = next[m][n][i];
          if (n * 16 < in) put<S, W>(grads + own, grad[m][n], m, n);
        }
      }
      if (l == 0) {
        __syncwarp();
        store_lines<S, W>(p.grad_input + first * in, grads + own, rows, in);
        __syncwarp();
      }
    }
  }
  wait_for_copies<0>();
  each_number<holds>([&](auto h) {
    for (int l = p.lowest; l < p.layers; l++) {
      const FusedLayer<S>& layer = p.layer[l];
      if (layer.held == h)
        move_part<W, true>(held[h], place_of_part<W>(warp), layer.weight_sums + blockIdx.x * p.sums_stride,
                           layer.out_features, layer.in_features);
    }
  });
}

}  // namespace fastmlp::cuda

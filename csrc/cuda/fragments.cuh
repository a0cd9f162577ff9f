// The parts of the kernels of fused_mma_forward.cuh and fused_mma_backward.cuh: fragments, which are a warp's share of
// a matrix in registers as mma.m16n8k16 takes it; lines, which are rows of features in shared memory; and the copies
// and products between them. Includes nothing of either pass. A kernel reaches global memory only through FusedNetwork.
#pragma once

#include <utility>

#include "../contract/activation_info.h"
#include "fused.h"
#include "mma.cuh"

namespace fastmlp::cuda {

// Activations cheap enough to inline once per register. Networks that use only these get the unrolled kernel, others
// the looping one. Must be a prefix of `Activations`, because kinds are compared by index. Relu is applied by the
// instruction that rounds, and its derivative is a mask.
using LightActivations = ActivationList<Identity, Relu>;
template <class... A> constexpr bool is_prefix(ActivationList<A...> kinds) {
  return ((kind_in<A>(kinds) == kind_in<A>(Activations{})) && ...);
}
static_assert(is_prefix(LightActivations{}), "kinds are compared by index");
template <class Kinds> constexpr bool is_light = Kinds::size == LightActivations::size;

// How many gradients of weights stay in registers: one fewer where the code of other activations takes registers.
template <int W, class Kinds> constexpr int held_parts = MmaFused<W>::held - (is_light<Kinds> ? 0 : 1);

// Lines of features in shared memory, [..., W], as operands whose terms lie along a line, or across lines.
template <class S, int W> using AlongLines = OperandTile<S, W, W, false>;
template <class S, int W> using AcrossLines = OperandTile<S, W, W, true>;

// A warp's fragment of 16 rows and 16 features, as mma.m16n8k16 takes it for A. Its words in lane l are two features
// each: features 2 (l % 4) and the next of row l / 4, the same of row l / 4 + 8, and both again eight features further.
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

// Writes a fragment to lines in shared memory, from line 16 m and feature 16 n on; get() reads it from there.
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

// Zeroes values past the features and past the rows: a product of zero with infinity may have left NaN there.
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

// Calls f(a fragment's values, its number) for each of the fragments. If `rolled`, f's code stands there once, in a
// loop whose turns exchange the two fragments, because registers have no index at run time.
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

// Calls f(0) to f(count - 1) with numbers that are types, so that every compiler keeps what they index in registers.
template <int... number, class F>
__device__ __forceinline__ void each_number(std::integer_sequence<int, number...>, const F& f) {
  (f(std::integral_constant<int, number>()), ...);
}
template <int count, class F> __device__ __forceinline__ void each_number(const F& f) {
  each_number(std::make_integer_sequence<int, count>(), f);
}

// Calls f with the number of blocks of 16 that the padded features are, as a constant.
template <int W, class F> __device__ __forceinline__ void with_blocks(int features, const F& f) {
  if (features <= 16) return f(std::integral_constant<int, 1>());
  if (features <= 32) return f(std::integral_constant<int, 2>());
  if constexpr (W > 64) {
    if (features > 64) return f(std::integral_constant<int, 8>());
  }
  f(std::integral_constant<int, 4>());
}

// What a thread copies of some lines: item `item` of line `line` and of every step'th after it. Items are chunks or
// elements; a line counts as a power of two of them, so some threads may have an item past its end.
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

// Copies rows of x, from row `first` on, to so many lines. Only the first `rows` of them exist: the other lines become
// zeros, and so do features past the end up to the padded ones. All of `threads` threads call it, and the lines are
// complete after they have waited for their copies.
template <class S, int W>
__device__ __forceinline__ void load_lines(S* to, const StridedMatrix<S>& x, int64_t first, int rows, int lines,
                                           int features, int thread, int threads) {
  const LinePart part(thread, threads, padded(features) / chunk_elements);
  const int left = features - part.item * chunk_elements;
  const S* from = x.data + (first + part.line) * x.row_stride + part.item * chunk_elements * x.column_stride;
  const int64_t hop = part.step * x.row_stride;
  const bool vectors = has_vectors<chunk_elements>(x);
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

// Writes a warp's lines to row-major memory without gaps; `to` points to the first of the rows.
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

// Copies a layer's weights to lines, one for each output, with lines of zeros up to the padded outputs. Forward has the
// layer's biases in float32 behind them.
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

// sums += a b, where b is block n of 16 columns: of the weights' lines for forward, across these for dgrad.
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

// to[n] = fragment, without an index at run time, which registers do not have.
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

// Zeroes the fragments past a layer's features: the next product reads up to the padded ones.
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

}  // namespace fastmlp::cuda

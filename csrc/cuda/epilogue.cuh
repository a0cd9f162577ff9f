// What the product kernels of simt.cuh and mma.cuh have in common besides their products: which tile a block computes,
// and what follows its sums. Sums go from registers through shared memory, a slab of rows at a time, so that each row
// is read and written in long runs, and the code of an activation stands in a kernel once, in a loop, not once for each
// register.
#pragma once

#include "arithmetic.cuh"

namespace fastmlp::cuda {

// The tile of C that a block computes; row and column count tiles.
struct TilePlace {
  unsigned row, column;
};

template <class Tile, class S> __device__ __forceinline__ TilePlace tile_of_block(const Product<S>& p) {
  const unsigned columns = unsigned(ceil_divide(p.n, Tile::BN));
  return {blockIdx.x / columns, blockIdx.x % columns};
}

// The terms of k that a block sums: all of them, or one of several parts.
struct TermsOfSum {
  int64_t first;
  int count;
};

template <class S> __device__ __forceinline__ TermsOfSum terms_of_block(const Product<S>& p) {
  const int64_t first = blockIdx.z * p.part, end = first + p.part < p.k ? first + p.part : p.k;
  return {first, int(end - first)};
}

// Rows of a tile's sums in shared memory, on their way out; padded, so that rows begin in different banks.
template <class C, int rows_, int columns_, int padding = 4> struct Slab {
  static constexpr int rows = rows_, columns = columns_;
  C sums[rows][columns + padding];
};

// Writes the sums over k of A's rows, from row `first` on. `sums` has `sharers` partial sums of each row, which are
// added in their order; it lies in shared memory and may be overwritten after the next barrier.
template <class S, int sharers, int rows>
__device__ void finish_row_sums(const Product<S>& p, const Compute<S> (&sums)[sharers][rows], int64_t first,
                                int64_t part) {
  __syncthreads();
  for (int r = threadIdx.x; r < rows; r += blockDim.x) {
    Compute<S> sum = 0;
#pragma unroll
    for (int sharer = 0; sharer < sharers; sharer++) sum += sums[sharer][r];
    if (first + r >= p.m) return;
    if (p.row_partials) {
      p.row_partials[part * p.m + first + r] = sum;
    } else {
      p.row_sums[first + r] = Narrow<S>::from(sum);
    }
  }
}

// One thread's part of the epilogue: 16 bytes of sums beside each other, in every `step`th row of the slab.
template <class S, Epilogue kind, class Slab, int threads> class Finisher {
 public:
  using C = Compute<S>;
  static constexpr int count = per_16_bytes<C>, runs = Slab::columns / count, step = threads / runs;
  static_assert(threads % runs == 0 && Slab::rows % step == 0, "rows of the slab are dealt out evenly");

  __device__ Finisher(const Product<S>& product, int64_t row, int64_t column, int64_t part)
      : p(product), first_row(row), first_column(column + threadIdx.x % runs * count), part(part) {
    const int64_t left = p.n - first_column;
    valid = left < 0 ? 0 : left > count ? count : int(left);
    if constexpr (kind == Epilogue::forward) {
      if (p.bias && valid > 0) load_run(bias, p.bias + first_column * p.bias_stride, p.bias_stride, valid, p.vectors);
    }
  }

  // Row r of the slab is row row_of(r) of the tile.
  template <class RowOf> __device__ void finish(const Slab& slab, const RowOf& row_of) {
    if (valid == 0) return;
    if constexpr (kind == Epilogue::wgrad) {
      each_row(slab, row_of, [&](int64_t at, int64_t, C(&sums)[count]) {
        if (p.partials) {
          store_run(p.partials + part * p.m * p.n + at, sums, valid, p.vectors);
        } else {
          store_run(p.output + at, sums, valid, p.vectors);
        }
      });
    } else {
      with_activation(p.activation.kind, Activations{}, [&](auto activation) {
        using A = decltype(activation);
        each_row(slab, row_of, [&](int64_t at, int64_t row, C(&sums)[count]) {
          if constexpr (kind == Epilogue::forward) {
            forward<A>(at, sums);
          } else {
            dgrad<A>(at, row, sums);
          }
        });
      });
    }
  }

  // Writes the sums of the columns that dgrad wrote, added in the order of rows; `slab` is overwritten.
  __device__ void finish_columns(Slab& slab, int64_t row_of_tiles) {
    if constexpr (kind == Epilogue::dgrad) {
      static_assert(step <= Slab::rows);
      if (!p.column_sums) return;
      __syncthreads();
#pragma unroll
      for (int e = 0; e < count; e++) slab.sums[threadIdx.x / runs][threadIdx.x % runs * count + e] = column_sums[e];
      __syncthreads();
      for (int column = threadIdx.x; column < Slab::columns; column += threads) {
        C sum = 0;
        for (int r = 0; r < step; r++) sum += slab.sums[r][column];
        const int64_t n = first_column - threadIdx.x % runs * count + column;
        if (n < p.n) p.column_sums[row_of_tiles * p.n + n] = sum;
      }
    }
  }

 private:
  template <class RowOf, class F> __device__ void each_row(const Slab& slab, const RowOf& row_of, const F& f) {
#pragma unroll 1
    for (int r = threadIdx.x / runs; r < Slab::rows; r += step) {
      const int64_t row = first_row + row_of(r);
      if (row >= p.m) return;
      C sums[count];
#pragma unroll
      for (int e = 0; e < count; e++) sums[e] = slab.sums[r][threadIdx.x % runs * count + e];
      f(row * p.n + first_column, row, sums);
    }
  }

  template <class A> __device__ void forward(int64_t at, C (&sums)[count]) {
#pragma unroll
    for (int e = 0; e < count; e++) sums[e] += bias[e];
    if (p.pre_activation) store_run(p.pre_activation + at, sums, valid, p.vectors);
    if (!p.output) return;
#pragma unroll
    for (int e = 0; e < count; e++) sums[e] = A::template value<ScalarMath<C>>(sums[e], p.activation.scalars);
    store_run(p.output + at, sums, valid, p.vectors);
  }

  template <class A> __device__ void dgrad(int64_t at, int64_t row, C (&sums)[count]) {
    if (p.saved.data) {
      C saved[count];
      load_run(saved, p.saved.data + row * p.saved.row_stride + first_column * p.saved.column_stride,
               p.saved.column_stride, valid, p.vectors);
#pragma unroll
      for (int e = 0; e < count; e++)
        sums[e] = A::template gradient<ScalarMath<C>>(sums[e], saved[e], p.activation.scalars);
    }
#pragma unroll
    for (int e = 0; e < count; e++) column_sums[e] += sums[e];
    store_run(p.output + at, sums, valid, p.vectors);
  }

  const Product<S>& p;
  int64_t first_row, first_column, part;
  int valid;
  C bias[count] = {};
  C column_sums[count] = {};
};

// What follows the sums of a block's tile. put(pass) writes sums of a pass from registers to the slab, of which row r
// is row row_of(pass, r) of the tile.
template <class Tile, Epilogue epilogue, class S, class Slab, class Put, class RowOf>
__device__ __forceinline__ void finish_tile(const Product<S>& p, Slab& slab, const TilePlace& place, const Put& put,
                                            const RowOf& row_of) {
  Finisher<S, epilogue, Slab, Tile::threads> finisher(p, int64_t(place.row) * Tile::BM,
                                                      int64_t(place.column) * Tile::BN, blockIdx.z);
  // Unrolled, so that the registers of the sums that went out are free.
#pragma unroll
  for (int pass = 0; pass < Tile::passes; pass++) {
    __syncthreads();
    put(pass);
    __syncthreads();
    finisher.finish(slab, [&](int r) { return row_of(pass, r); });
  }
  finisher.finish_columns(slab, place.row);
}

}  // namespace fastmlp::cuda

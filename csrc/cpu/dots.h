// Products with few rows or few columns, as inner products along k of what lies in memory: nothing is packed. Called by
// gemm.cpp for wide layers and by row_forward.h for narrow ones. Owns no memory and starts no thread.
#pragma once

#include <algorithm>

#include "packing.h"
#include "parallel.h"
#include "product.h"

namespace fastmlp::cpu {

// Few rows or columns of C are inner products, because adding up the lanes of a vector for each element then costs less
// than packing the larger operand, or than filling a few lanes of a tile. The longer the sums, the more of them pay.
constexpr int64_t dot_rows = 8, most_dot_rows = 64;
constexpr int64_t dot_columns = 4, most_dot_columns = 16;
constexpr int64_t units_per_dot = 16;
// The smaller operand may be strided along k: at most so many elements are copied to be gapless.
constexpr int64_t most_gathered = int64_t(1) << 18;

template <class S> bool few_rows(const Kernels<S>& kernels, int64_t m, int64_t k) {
  return m <= std::min(dot_rows + kernels.units(k) / units_per_dot, most_dot_rows);
}

template <class S> bool few_columns(const Kernels<S>& kernels, int64_t n, int64_t k) {
  return n <= std::min(dot_columns + kernels.units(k) / units_per_dot, most_dot_columns);
}

// Whether a plain product of this shape is computed as inner products, which depends on whether A and B are gapless
// along k.
template <class S>
bool goes_by_dots(const Kernels<S>& kernels, int64_t m, int64_t n, int64_t k, bool a_gapless, bool b_gapless) {
  const bool a_fits = a_gapless || m * k <= most_gathered;
  const bool b_fits = b_gapless || n * k <= most_gathered;
  // A sum shorter than a vector wastes lanes; but with one or two rows of C nothing is worth packing.
  if (k < kernels.lanes && (m > 2 || k == 0)) return false;
  return (few_rows(kernels, m, k) && b_gapless && a_fits) || (few_columns(kernels, n, k) && a_gapless && b_fits);
}

// Rows `i` of A, or columns of B, gapless along k: where they lie, or copied to `buffer`.
template <class S> Operand<S> gathered(const Operand<S>& x, Range i, int64_t k, S* buffer) {
  Operand<S> rows = x;
  rows.data += i.begin * x.stride;
  if (x.k_stride == 1) return rows;
  S* out = buffer;
  for (int64_t r = 0; r < i.size(); r++, out += k) as_run(rows.data + r * x.stride, x.k_stride, k, out);
  rows.data = buffer;
  rows.stride = k;
  return rows;
}

// How many values multiply_by_dots needs in `bias`.
template <class S> int64_t dot_bias_size(const Kernels<S>& kernels) {
  return std::max(kernels.mr, kernels.lanes) * std::max(most_dot_columns, kernels.nr);
}

// Rows m and columns n of the product. `a` and `b` begin at the first of these and are gapless along k; `tile` has room
// for a register tile.
template <class S>
void multiply_by_dots(const Kernels<S>& kernels, const Product<S>& p, Range m, Range n, const Operand<S>& a,
                      const Operand<S>& b, Compute<S>* tile, Compute<S>* bias) {
  // Each lane of a vector sums a chain of its own.
  const int64_t kc = even_block(p.k, kernels.chain * kernels.lanes, kernels.k_unit);
  // Rows of C that follow each other without a gap are one run for the epilogue, because they fill its vectors.
  const bool one_run = p.n <= std::min(most_dot_columns, kernels.nr) && p.leading_dimension == p.n;
  Epilogue<S> e{};
  e.tile = tile;
  e.leading_dimension = p.leading_dimension;
  e.scalars = p.activation.scalars;
  e.bias = p.bias.data ? bias : nullptr;
  const auto epilogue = kernels.activations[p.activation.kind].epilogue;
  for (int64_t j = n.begin; j < n.end; j += kernels.nr) {
    const int64_t columns = std::min(kernels.nr, n.end - j);
    // Rows for which the lanes of the sums fill vectors, where the tile has room for them.
    const bool full = one_run && kernels.lanes * columns <= kernels.mr * kernels.nr;
    const int64_t together = full ? kernels.lanes : kernels.mr;
    e.tile_step = one_run ? columns : kernels.nr;
    if (e.bias) load_bias(kernels, p.bias, {j, j + columns}, bias);
    if (one_run && e.bias) {
      for (int64_t i = columns; i < std::min(together, m.size()) * columns; i++) bias[i] = bias[i - columns];
    }
    for (int64_t i = m.begin; i < m.end; i += together) {
      const int64_t rows = std::min(together, m.end - i);
      e.rows = one_run ? 1 : rows;
      e.columns = one_run ? rows * columns : columns;
      const int64_t at = i * p.leading_dimension + j;
      e.output = p.output + at;
      e.pre_activation = p.pre_activation ? p.pre_activation + at : nullptr;
      for (int64_t pc = 0; pc < p.k; pc += kc) {
        kernels.dot_tile(rows, columns, std::min(kc, p.k - pc), a.data + (i - m.begin) * a.stride + pc, a.stride,
                         b.data + (j - n.begin) * b.stride + pc, b.stride, tile, e.tile_step, pc > 0);
      }
      epilogue(e);
    }
  }
}

}  // namespace fastmlp::cpu

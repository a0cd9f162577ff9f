// Products of a block of rows whose A is read where it lies, in memory or in a cache. Used by row_blocks.cpp. Owns no
// memory; arithmetic is behind the table.
#pragma once

#include <algorithm>

#include "../contract/activation_info.h"
#include "kernel_table.h"
#include "parallel.h"

namespace fastmlp::cpu {

// A block of B that is read again for each tile of rows comes from the L1 cache.
constexpr int64_t near_bytes = 20 << 10;

// C = act(A B + bias), or C += A B, where B has `n` columns in panels of NR.
template <class S> struct RowProduct {
  int64_t m, n, k;
  const S* a;
  int64_t a_step, a_k_step;  // from one row of A to the next, and along k
  const S* b;
  int64_t b_panel, b_step;  // from one panel of B to the next, and along k
  bool b_padded;
  S* output;
  int64_t output_step;
  S* pre_activation = nullptr;  // like output
  const S* bias = nullptr;      // padded to a vector
  ActivationSpec activation;
  // Memory that nobody has touched yet, gapless: its lines are asked for a tile ahead.
  bool fresh_a = false, fresh_output = false;
  bool sums = false, add = false;  // the output is a sum: of this product alone, or added to
};

template <class S>
void multiply_tile(const Kernels<S>& kernels, const RowProduct<S>& p, S* scratch, Range rows, int64_t panel) {
  const int64_t column = panel * kernels.nr;
  const int64_t at = rows.begin * p.output_step + column;
  const bool simple = p.activation.kind == identity_kind || p.activation.kind == relu_kind;
  const bool complete = simple && !p.pre_activation && !p.sums;
  Tile<S> t;
  t.columns = std::min(kernels.nr, p.n - column);
  t.a_step = p.a_step;
  t.a_k_step = p.a_k_step;
  t.b_step = p.b_step;
  t.b_padded = p.b_padded;
  // One line with each k.
  const int64_t asked = panel * p.k * (line_bytes / int64_t(sizeof(S)));
  const auto ahead = [&](bool fresh, const S* data, int64_t step) {
    const int64_t next = rows.end * step + asked;
    return fresh && next < p.m * step ? data + next : nullptr;
  };
  t.input_ahead = ahead(p.fresh_a, p.a, p.a_step);
  t.output_ahead = ahead(p.fresh_output, p.output, p.output_step);
  t.sums = p.sums ? p.output + at : scratch;
  t.sums_step = p.sums ? p.output_step : kernels.nr;
  t.output = nullptr;
  t.leading_dimension = p.output_step;
  t.bias = p.bias ? p.bias + column : nullptr;
  t.relu = p.activation.kind == relu_kind;
  const auto kernel = kernels.row_kernel(rows.size(), t.columns);
  // Chains of equal length: the longest one sets the error.
  const int64_t step = ceil_divide(p.k, std::max<int64_t>(1, ceil_divide(p.k, kernels.chain)));
  int64_t from = 0;
  do {
    t.k = std::min(step, p.k - from);
    t.a = p.a + rows.begin * p.a_step + from * p.a_k_step;
    t.b = p.b + panel * p.b_panel + from * p.b_step;
    t.add = from > 0 || p.add;
    from += t.k;
    if (from >= p.k && complete) t.output = p.output + at;
    kernel(t);
  } while (from < p.k);
  if (complete || p.sums) return;
  Epilogue<S> e;
  e.tile = scratch;
  e.tile_step = kernels.nr;
  e.rows = rows.size();
  e.columns = t.columns;
  e.sums = nullptr;
  e.sums_step = 0;
  e.output = p.output + at;
  e.pre_activation = p.pre_activation ? p.pre_activation + at : nullptr;
  e.leading_dimension = p.output_step;
  e.bias = t.bias;
  e.scalars = p.activation.scalars;
  kernels.activations[p.activation.kind].epilogue(e);
}

// `scratch` holds a tile.
template <class S> void multiply_rows(const Kernels<S>& kernels, const RowProduct<S>& p, S* scratch) {
  // Tiles of equal height: a short last one would leave registers empty.
  const int64_t tiles = ceil_divide(p.m, kernels.mr), panels = ceil_divide(p.n, kernels.nr);
  if (p.k * p.n * int64_t(sizeof(S)) <= near_bytes) {
    for (int64_t i = 0; i < tiles; i++) {
      for (int64_t j = 0; j < panels; j++) multiply_tile(kernels, p, scratch, part_of(p.m, 1, i, tiles), j);
    }
  } else {
    for (int64_t j = 0; j < panels; j++) {
      for (int64_t i = 0; i < tiles; i++) multiply_tile(kernels, p, scratch, part_of(p.m, 1, i, tiles), j);
    }
  }
}

// Panels of B from a matrix of k rows or, as `transposed`, k columns.
template <class S>
void pack_panels(const Kernels<S>& kernels, const Matrix& x, int64_t n, int64_t k, bool transposed, S* panels) {
  const int64_t stride = transposed ? x.row_stride : x.column_stride;
  const int64_t k_stride = transposed ? x.column_stride : x.row_stride;
  for (int64_t j = 0; j < n; j += kernels.nr) {
    kernels.pack_b(static_cast<const S*>(x.data) + j * stride, stride, k_stride, std::min(kernels.nr, n - j), k,
                   panels + j * k);
  }
}

template <class S> int64_t panels_size(const Kernels<S>& kernels, int64_t n, int64_t k) {
  return round_up(n, kernels.nr) * k;
}

}  // namespace fastmlp::cpu

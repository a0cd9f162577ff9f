// Products of a block of rows, whose A is read where it lies, in memory or in a cache. Called by row_forward.h and
// row_backward.h. Owns no memory, and leaves all arithmetic to the kernels of the table.
#pragma once

#include <algorithm>

#include "epilogue.h"
#include "kernel_table.h"
#include "parallel.h"

namespace fastmlp::cpu {

// A block of B of so many bytes stays in the L1 cache while it is read again for each tile of rows.
constexpr int64_t near_bytes = 20 << 10;

// C = act(A B + bias), or C (+)= A B, where B has `n` columns in panels of NR.
template <class S> struct RowProduct {
  int64_t m, n, k;
  const S* a;
  int64_t a_step, a_k_step;  // from one row of A to the next, and along k
  const S* b;
  int64_t b_panel, b_step;  // from one panel of B to the next, and along k
  bool b_padded;            // whether B may be read to the end of a vector
  S* output;
  int64_t output_step;
  S* pre_activation = nullptr;  // like output
  const S* bias = nullptr;      // padded to a vector
  ActivationSpec activation;
  // Whether A and the output are gapless memory that no cache holds yet. Their lines are prefetched a tile ahead.
  bool fresh_a = false, fresh_output = false;
  bool sums = false;  // whether the output is raw sums, without bias or activation
  bool add = false;   // whether sums are added to the output
};

// The tile of some rows and one panel. `scratch` holds a tile.
template <class S>
void multiply_tile(const Kernels<S>& kernels, const RowProduct<S>& p, S* scratch, Range rows, int64_t panel) {
  const int64_t column = panel * kernels.nr;
  const int64_t at = rows.begin * p.output_step + column;
  // Whether the kernel itself does everything.
  const bool complete = !needs_epilogue(p.activation) && !p.pre_activation && !p.sums;
  Tile<S> t;
  t.columns = std::min(kernels.nr, p.n - column);
  t.a_step = p.a_step;
  t.a_k_step = p.a_k_step;
  t.b_step = p.b_step;
  t.b_padded = p.b_padded;
  // Earlier panels prefetched one line with each k.
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
  t.relu = is_relu(p.activation);
  const auto kernel = kernels.row_kernel(rows.size(), t.columns);
  const int64_t step = even_block(p.k, kernels.chain);
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
  kernels.activations[p.activation.kind].epilogue({
      .tile = scratch,
      .tile_step = kernels.nr,
      .rows = rows.size(),
      .columns = t.columns,
      .output = p.output + at,
      .pre_activation = p.pre_activation ? p.pre_activation + at : nullptr,
      .leading_dimension = p.output_step,
      .bias = t.bias,
      .scalars = p.activation.scalars,
  });
}

// `scratch` holds a tile.
template <class S> void multiply_rows(const Kernels<S>& kernels, const RowProduct<S>& p, S* scratch) {
  // Tiles are equally tall, because a short last one would leave registers empty.
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

// Packs panels of B from a matrix of k rows, or of k columns if `transposed`.
template <class S>
void pack_panels(const Kernels<S>& kernels, const Matrix& x, int64_t n, int64_t k, bool transposed, S* panels) {
  const int64_t stride = transposed ? x.row_stride : x.column_stride;
  const int64_t k_stride = transposed ? x.column_stride : x.row_stride;
  for (int64_t j = 0; j < n; j += kernels.nr) {
    kernels.pack_b(static_cast<const S*>(x.data) + j * stride, stride, k_stride, std::min(kernels.nr, n - j), k,
                   panels + j * k);
  }
}

// How many elements those panels take.
template <class S> int64_t panels_size(const Kernels<S>& kernels, int64_t n, int64_t k) {
  return round_up(n, kernels.nr) * k;
}

}  // namespace fastmlp::cpu

// The product declared in matrix_product.h. Called by register.cpp. Takes its scratch before it starts, and leaves all
// arithmetic to the kernels of the table.
#include "matrix_product.h"

#include <algorithm>

#include "../contract/activation_info.h"
#include "../contract/storage.h"
#include "dispatch.h"
#include "dots.h"
#include "gemm.h"
#include "row_product.h"
#include "row_shape.h"
#include "workspace.h"

namespace fastmlp::cpu {
namespace {

// What of B stays in an L2 cache while all rows of A pass by.
constexpr int64_t near_columns_bytes = 256 << 10;

// With so short a K little is saved by leaving A unpacked.
constexpr int64_t shortest_k = 5;

// Whether the row kernels compute it: A is read where it lies, and B too if it lies row by row.
template <class S> bool goes_by_rows(const Kernels<S>& kernels, const ProductPass& pass) {
  if (pass.row_sums || pass.k < shortest_k) return false;
  if (pass.k * pass.n * int64_t(sizeof(S)) > near_columns_bytes) return false;
  return !goes_by_dots(kernels, pass.m, pass.n, pass.k, pass.a.column_stride == 1, pass.b.row_stride == 1);
}

// Each task takes some rows of A through all of B.
template <class S> void multiply_by_rows(const KernelTable& table, const ProductPass& pass, int threads) {
  const Kernels<S>& kernels = kernels_of<S>(table);
  const Matrix& b = pass.b;
  const bool in_place = b.column_stride == 1 && !must_be_copied<S>(b);
  threads = useful_threads(double(pass.m) * double(pass.n) * double(pass.k + 16), threads);
  const int64_t tiles = ceil_divide(pass.m, kernels.mr), tasks = std::min<int64_t>(tiles, threads);
  const int64_t padded = round_up(pass.n, kernels.nr), tile = kernels.mr * kernels.nr;
  const auto carve = [&](Carver& carver) {
    struct {
      S *panels, *bias, *tiles;
    } all{in_place ? nullptr : carver.take<S>(padded * pass.k), pass.bias.data ? carver.take<S>(padded) : nullptr,
          carver.take<S>(tasks * tile)};
    return all;
  };
  Carver measure;
  carve(measure);
  const Workspace workspace(measure.used());
  Carver carver(workspace.data());
  const auto own = carve(carver);
  table.mark();
  if (!in_place) pack_panels(kernels, {b.data, b.column_stride, b.row_stride}, pass.n, pass.k, true, own.panels);
  if (own.bias) load_bias<S>(kernels, pass.bias, {0, pass.n}, own.bias);
  RowProduct<S> whole;
  whole.n = pass.n;
  whole.k = pass.k;
  whole.a_step = pass.a.row_stride;
  whole.a_k_step = pass.a.column_stride;
  whole.b = in_place ? static_cast<const S*>(b.data) : own.panels;
  whole.b_panel = in_place ? kernels.nr : kernels.nr * pass.k;
  whole.b_step = in_place ? b.row_stride : kernels.nr;
  whole.b_padded = !in_place;
  whole.output_step = pass.row_stride;
  whole.bias = own.bias;
  whole.activation = pass.activation;
  run_tasks(tasks, threads, [&](int64_t task, int) {
    const Range rows = part_of(pass.m, kernels.mr, task, tasks);
    const int64_t at = rows.begin * pass.row_stride;
    RowProduct<S> p = whole;
    p.m = rows.size();
    p.a = static_cast<const S*>(pass.a.data) + rows.begin * pass.a.row_stride;
    p.output = static_cast<S*>(pass.output) + at;
    p.pre_activation = pass.pre_activation ? static_cast<S*>(pass.pre_activation) + at : nullptr;
    table.mark();
    multiply_rows(kernels, p, own.tiles + task * tile);
  });
}

template <class S> void multiply_as(const ProductPass& pass, int threads) {
  if constexpr (in_itself<S>) {
    if (goes_by_rows(kernels_of<S>(active()), pass)) return multiply_by_rows<S>(active(), pass, threads);
  }
  Product<S> p;
  p.m = pass.m;
  p.n = pass.n;
  p.k = pass.k;
  p.a.data = static_cast<const S*>(pass.a.data);
  p.a.stride = pass.a.row_stride;
  p.a.k_stride = pass.a.column_stride;
  p.b.data = static_cast<const S*>(pass.b.data);
  p.b.stride = pass.b.column_stride;
  p.b.k_stride = pass.b.row_stride;
  p.output = static_cast<S*>(pass.output);
  p.pre_activation = static_cast<S*>(pass.pre_activation);
  p.leading_dimension = pass.row_stride;
  p.bias = pass.bias;
  p.activation = pass.activation;
  p.row_sums = static_cast<S*>(pass.row_sums);
  // Chunks of a split K are written without gaps, and have neither bias nor activation.
  p.split_k = pass.row_stride == pass.n && !pass.bias.data && pass.activation.kind == identity_kind;
  multiply(active(), p, threads);
}

}  // namespace

void multiply(const ProductPass& pass, int threads) {
  ProductPass turned = pass;
  if (pass.n == 1 && pass.row_stride == 1 && !pass.row_sums) {
    // A column is computed as a row, because sums of several columns are added up in the lanes of one vector.
    turned.m = 1;
    turned.n = pass.m;
    turned.a = {pass.b.data, pass.b.column_stride, pass.b.row_stride};
    turned.b = {pass.a.data, pass.a.column_stride, pass.a.row_stride};
    turned.bias.stride = 0;
    turned.row_stride = pass.m;
  }
  with_storage(pass.dtype, [&](auto storage) { multiply_as<decltype(storage)>(turned, threads); });
}

}  // namespace fastmlp::cpu

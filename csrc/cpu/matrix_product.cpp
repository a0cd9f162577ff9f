// The product declared in matrix_product.h. Called by register.cpp. Takes its scratch before it starts, and leaves all
// arithmetic to the kernels of the table.
//
// Small products go by the row kernels, which read A where it lies, and B too where that is no slower than packing it.
// The rest goes to the macro-kernel of gemm.h. Which way a product goes depends on its shape and strides alone.
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

// An A of so many bytes stays in an L2 cache while it is read again for each panel of B, and so much of B is read once.
constexpr int64_t most_bytes_of_a = 512 << 10, most_bytes_of_b = 1024 << 10;

// From so many tiles on B is packed although it could be read in place.
constexpr int64_t many_tiles = 8;

// With so short a K most of the time goes into writing C and into calls of kernels.
constexpr int64_t short_k = 5;

template <class S> bool is_by_dots(const Kernels<S>& kernels, const ProductPass& pass) {
  return !pass.row_sums &&
         goes_by_dots(kernels, pass.m, pass.n, pass.k, pass.a.column_stride == 1, pass.b.row_stride == 1);
}

// Whether rows or columns that lie so far apart share a few lines of an L1 cache.
template <class S> bool crowded(int64_t step) { return step != 0 && step * int64_t(sizeof(S)) % 4096 == 0; }

// Whether the sums of the rows of A, if they are asked for, are column sums of gapless memory.
bool sums_are_near(const ProductPass& pass) {
  return !pass.row_sums || (pass.a.row_stride == 1 && pass.a.column_stride == pass.m);
}

template <class S> void sum_rows(const Kernels<S>& kernels, const ProductPass& pass) {
  if (!pass.row_sums) return;
  kernels.column_sums(pass.k, pass.m, static_cast<const S*>(pass.a.data), static_cast<S*>(pass.row_sums), false);
}

// How many columns a product of a short K may have for the row kernels. The macro-kernel writes longer runs; but where
// its tiles hold less of C, it is called more often.
template <class S> int64_t most_short_columns(const Kernels<S>& kernels) {
  const bool larger = kernels.mr * kernels.nr > kernels.stream_rows * kernels.stream_columns;
  return larger ? 4 * kernels.nr : kernels.nr;
}

// Whether the row kernels compute a product that is not one of inner products.
template <class S> bool goes_by_rows(const Kernels<S>& kernels, const ProductPass& pass) {
  constexpr int64_t size = sizeof(S);
  const Matrix &a = pass.a, &b = pass.b;
  if (pass.m == 0 || pass.n == 0 || pass.k == 0 || !sums_are_near(pass)) return false;
  if (pass.k < short_k && pass.n > most_short_columns(kernels)) return false;
  if ((a.row_stride != 1 && a.column_stride != 1) || (pass.m > 1 && crowded<S>(a.row_stride)) ||
      crowded<S>(a.column_stride)) {
    return false;
  }
  // One row has too few sums that go at once, and the macro-kernel takes more columns of B together.
  if (pass.m == 1 && b.column_stride == 1 && pass.n >= kernels.stream_columns) return false;
  // Of an A that runs across k each k reads a line. If the tile needs a small part of it, lines must stay in an L1
  // cache for the next tile.
  const bool wastes_lines = a.row_stride == 1 && pass.m > kernels.mr && 2 * kernels.mr * size < line_bytes;
  if (wastes_lines && pass.k * (line_bytes + kernels.nr * size) > near_bytes) return false;
  const int64_t bytes_of_a = pass.m * pass.k * size, bytes_of_b = pass.k * pass.n * size;
  return bytes_of_b <= near_bytes || (bytes_of_a <= most_bytes_of_a && bytes_of_b <= most_bytes_of_b);
}

// Whether the row kernels read B where it lies.
template <class S> bool reads_in_place(const Kernels<S>& kernels, const ProductPass& pass) {
  if (pass.b.column_stride != 1 || crowded<S>(pass.b.row_stride)) return false;
  // Every tile loads all of B again, and a vector that crosses a line takes two loads. With many tiles packing costs
  // less, at least beside an A of which each k reads a line too.
  const bool crosses_lines = pass.b.row_stride * int64_t(sizeof(S)) % line_bytes != 0;
  return !(crosses_lines && pass.a.row_stride == 1 && pass.m > many_tiles * kernels.mr);
}

// C^T = B^T A^T, without the sums of A's rows.
ProductPass transposed(const ProductPass& pass) {
  ProductPass turned = pass;
  turned.row_sums = nullptr;
  turned.m = pass.n;
  turned.n = pass.m;
  turned.a = {pass.b.data, pass.b.column_stride, pass.b.row_stride};
  turned.b = {pass.a.data, pass.a.column_stride, pass.a.row_stride};
  turned.row_stride = pass.m;
  return turned;
}

// Whether a product with few columns is computed as one with few rows, because columns fill the lanes of vectors, and
// rows need not fill anything. For weight gradients, whose A lies row by row when it is transposed.
template <class S> bool goes_transposed(const Kernels<S>& kernels, const ProductPass& pass) {
  if (pass.a.row_stride != 1 || pass.row_stride != pass.n || pass.pre_activation) return false;
  if (pass.bias.data || pass.activation.kind != identity_kind || !sums_are_near(pass)) return false;
  const int64_t straight = pass.m * ceil_divide(pass.n, kernels.lanes);
  const int64_t turned = std::max<int64_t>(2, pass.n) * ceil_divide(pass.m, kernels.lanes);
  // Putting an element of the result in its place takes about as long as two vectors of products.
  const int64_t copies = pass.n > 1 ? 2 * pass.m * pass.n : 0;
  return straight * pass.k > turned * pass.k + copies && goes_by_rows(kernels, transposed(pass));
}

// Each task takes some rows of A through all of B.
template <class S> void multiply_by_rows(const KernelTable& table, const ProductPass& pass, int threads) {
  const Kernels<S>& kernels = kernels_of<S>(table);
  const Matrix& b = pass.b;
  const bool in_place = reads_in_place(kernels, pass);
  threads = useful_threads(double(pass.m) * double(pass.n) * double(pass.k + 16), threads);
  const int64_t tiles = ceil_divide(pass.m, kernels.mr), tasks = std::min<int64_t>(tiles, threads);
  const int64_t tile = kernels.mr * kernels.nr;
  const auto carve = [&](Carver& carver) {
    struct {
      S *panels, *bias, *tiles;
    } all{in_place ? nullptr : carver.take<S>(panels_size(kernels, pass.n, pass.k)),
          pass.bias.data ? carver.take<S>(round_up(pass.n, kernels.nr)) : nullptr, carver.take<S>(tasks * tile)};
    return all;
  };
  Carver measure;
  carve(measure);
  const Workspace workspace(measure.used());
  Carver carver(workspace.data());
  const auto own = carve(carver);
  table.mark();
  if (!in_place) pack_panels(kernels, b, pass.n, pass.k, false, own.panels);
  if (own.bias) load_bias<S>(kernels, pass.bias, {0, pass.n}, own.bias);
  sum_rows<S>(kernels, pass);
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

template <class S> void multiply_transposed(const KernelTable& table, const ProductPass& pass, int threads) {
  sum_rows<S>(kernels_of<S>(table), pass);
  ProductPass turned = transposed(pass);
  if (pass.n == 1) return multiply_by_rows<S>(table, turned, threads);
  const Workspace workspace(size_t(pass.m * pass.n) * sizeof(S));
  turned.output = workspace.data();
  multiply_by_rows<S>(table, turned, threads);
  copied({workspace.data(), 1, pass.m}, {0, pass.m}, pass.n, static_cast<S*>(pass.output));
}

template <class S> void multiply_as(const ProductPass& pass, int threads) {
  const KernelTable& table = active();
  const Kernels<S>& kernels = kernels_of<S>(table);
  const bool by_dots = is_by_dots(kernels, pass);
  if constexpr (in_itself<S>) {
    if (!by_dots && goes_transposed(kernels, pass)) return multiply_transposed<S>(table, pass, threads);
    if (!by_dots && goes_by_rows(kernels, pass)) return multiply_by_rows<S>(table, pass, threads);
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
  // Chunks of a split K are written without gaps, and have neither bias, activation nor pre-activation. Inner products
  // along K are not split.
  p.split_k = !by_dots && pass.row_stride == pass.n && !pass.bias.data && !pass.pre_activation &&
              pass.activation.kind == identity_kind;
  multiply(table, p, threads);
}

}  // namespace

void multiply(const ProductPass& pass, int threads) {
  with_storage(pass.dtype, [&](auto storage) { multiply_as<decltype(storage)>(pass, threads); });
}

}  // namespace fastmlp::cpu

// The macro-kernel declared in gemm.h: chooses a path, divides C and K among tasks, gives each its scratch, and adds up
// the chunks of a split K. Called by network.cpp and matrix_product.cpp. Baseline code: it runs on every processor of
// the architecture, and leaves arithmetic to the kernels of the table.
//
// There are three paths, chosen by the shape and the layout alone (path_of):
//   packed    A and B are packed into panels: A's block of MC x KC stays in the L2 cache, and a panel of B, KC x NR,
//             comes from the L1 or L2 cache while the block of A passes by.
//   streamed  A is packed, and B is read where it is, in runs along n: for few rows of C, or a short K.
//   dots      neither is packed: inner products along k, for few rows or columns of C.
#include "gemm.h"

#include <algorithm>

#include "dots.h"
#include "gemm_packed.h"
#include "gemm_streamed.h"
#include "parallel.h"
#include "workspace.h"

namespace fastmlp::cpu {
namespace {

// With so few rows of C, B is streamed, because packing it would cost more than the products. With more rows than that
// B is streamed only if K is short and the result can hold the sums. 16 bits are converted each time they are read,
// hence fewer rows.
template <class S> constexpr int64_t streamed_rows = in_itself<S> ? 64 : 24;

// There are no more parts than units, because an empty part would begin where another one does.
int64_t most_parts(int64_t n, int64_t unit) { return std::max<int64_t>(1, ceil_divide(n, unit)); }

template <class S> Path path_of(const Kernels<S>& kernels, const Product<S>& p) {
  const bool plain = p.a.form == Form::plain && p.b.form == Form::plain && !p.row_sums && !p.split_k;
  if (plain && goes_by_dots(kernels, p.m, p.n, p.k, p.a.k_stride == 1, p.b.k_stride == 1)) return Path::dots;
  // A short B that does not run along n is transposed first.
  const bool short_sums = in_itself<S> && p.k <= streamed_depth && p.m > streamed_rows<S>;
  const bool long_runs = p.b.stride == 1 && p.m <= streamed_rows<S> && p.n >= 2 * kernels.nr;
  if (p.b.form == Form::plain && (short_sums || long_runs)) return Path::streamed;
  return Path::packed;
}

template <class S>
void run_task(const Kernels<S>& kernels, const Product<S>& p, const TaskScratch<S>& scratch, const Assignment<S>& own,
              Path path) {
  const Range m = own.m, n = own.n;
  if (path == Path::dots) {
    // One of the two operands at most is not gapless along k, so that one buffer suffices.
    return multiply_by_dots(kernels, p, m, n, gathered(p.a, m, p.k, scratch.gathered),
                            gathered(p.b, n, p.k, scratch.gathered), scratch.tile, scratch.bias);
  }
  if (m.size() == 0 || (n.size() == 0 && !own.owns_row_sums)) return;
  if (path == Path::streamed) {
    StreamedTask<S>(kernels, p, scratch, own).run();
  } else {
    PackedTask<S>(kernels, p, scratch, own).run();
  }
  if (own.owns_row_sums && !own.row_sums_share) kernels.narrow(m.size(), scratch.row_sums, p.row_sums + m.begin);
}

// How many chunks K is cut into. A product with few tiles and a long K would leave threads idle without them.
template <class S> int64_t chunks_of(const Product<S>& p) {
  constexpr int64_t largest_result = 1 << 17;
  return p.split_k && p.m * p.n <= largest_result ? chunks_of_rows(p.k) : 1;
}

struct Grid {
  int64_t rows, columns;
};

// The division of C among threads that takes least time. Every thread packs its own A and B, and packing an element
// costs about as much as `packing` multiply-adds of the micro-kernel.
template <class S> Grid grid_of(const Kernels<S>& kernels, const Product<S>& p, Path path, int64_t threads) {
  const int64_t most_rows = most_parts(p.m, kernels.mr), most_columns = most_parts(p.n, kernels.nr);
  if (path == Path::dots) {
    return few_columns(kernels, p.n, p.k) ? Grid{std::min(threads, most_rows), 1}
                                          : Grid{1, std::min(threads, most_columns)};
  }
  constexpr double packing = 8;
  Grid best{1, 1};
  double least = -1;
  for (int64_t rows = 1; rows <= std::min(threads, most_rows); rows++) {
    const int64_t columns = std::min(threads / rows, most_columns);
    const double mt = double(ceil_divide(ceil_divide(p.m, kernels.mr), rows) * kernels.mr);
    const double nt = double(ceil_divide(ceil_divide(p.n, kernels.nr), columns) * kernels.nr);
    const double cost = mt * nt + packing * (mt + nt);
    if (least < 0 || cost < least) {
      least = cost;
      best = {rows, columns};
    }
  }
  return best;
}

}  // namespace

template <class S> void multiply(const KernelTable& table, const Product<S>& p, int threads) {
  using C = Compute<S>;
  const Kernels<S>& kernels = kernels_of<S>(table);
  const int64_t chunks = chunks_of(p);
  // Reading and writing an element costs time even where K is short, hence the 16.
  threads = useful_threads(double(p.m) * double(p.n) * double(p.k + 16), threads);
  const Path path = path_of(kernels, p);
  const Grid grid = grid_of(kernels, p, path, std::max<int64_t>(1, threads / chunks));
  const int64_t tiles = grid.rows * grid.columns;
  const int64_t tasks = tiles * chunks;
  threads = int(std::min<int64_t>(threads, tasks));

  const int64_t m = part_of(p.m, kernels.mr, grid.rows - 1, grid.rows).size() + kernels.mr;
  const int64_t n = part_of(p.n, kernels.nr, grid.columns - 1, grid.columns).size() + kernels.nr;
  const int64_t longest_k = std::min(p.k, ceil_divide(p.k, chunks) + kernels.k_unit);
  Carver measure;
  TaskScratch<S>(measure, kernels, p, path, m, n, longest_k);
  const size_t scratch_bytes = measure.used();
  const int64_t result = p.m * p.n;
  const size_t share_bytes = chunks > 1 ? size_t(chunks) * size_t(result + p.m) * sizeof(C) : 0;
  const Workspace workspace(scratch_bytes * size_t(threads) + share_bytes);
  C* const shares = reinterpret_cast<C*>(workspace.data() + scratch_bytes * size_t(threads));
  C* const sum_shares = shares + chunks * result;

  run_tasks(tasks, threads, [&](int64_t task, int slot) {
    const int64_t chunk = task / tiles;
    const int64_t tile = task % tiles;
    Carver carver(workspace.data() + scratch_bytes * size_t(slot));
    const TaskScratch<S> scratch(carver, kernels, p, path, m, n, longest_k);
    table.mark();
    Assignment<S> assignment{};
    assignment.m = part_of(p.m, kernels.mr, tile % grid.rows, grid.rows);
    assignment.n = part_of(p.n, kernels.nr, tile / grid.rows, grid.columns);
    assignment.k = chunks > 1 ? part_of(p.k, kernels.k_unit, chunk, chunks) : Range{0, p.k};
    assignment.share = chunks > 1 ? shares + chunk * result : nullptr;
    assignment.row_sums_share = chunks > 1 ? sum_shares + chunk * p.m : nullptr;
    // Every task in a row of the grid packs the same rows of A, so that the first one alone sums them.
    assignment.owns_row_sums = p.row_sums && tile / grid.rows == 0;
    run_task(kernels, p, scratch, assignment, path);
  });
  if (chunks > 1) {
    add_chunks(shares, chunks, result);
    kernels.narrow(result, shares, p.output);
    if (p.row_sums) {
      add_chunks(sum_shares, chunks, p.m);
      kernels.narrow(p.m, sum_shares, p.row_sums);
    }
  }
}

template void multiply<float>(const KernelTable&, const Product<float>&, int);
template void multiply<double>(const KernelTable&, const Product<double>&, int);
template void multiply<BFloat16>(const KernelTable&, const Product<BFloat16>&, int);
template void multiply<Float16>(const KernelTable&, const Product<Float16>&, int);

}  // namespace fastmlp::cpu

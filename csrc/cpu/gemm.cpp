// Blocking, packing, split-K and threads of the product declared in gemm.h. Baseline code: it runs on
// every processor of the architecture, and leaves arithmetic to the kernels of the table.
//
// Three paths, chosen by the shape and the layout alone (path_of):
//   packed    A and B are packed into panels: A's block of MC x KC stays in the L2 cache, a panel of B, KC x NR,
//             comes from the L1 or L2 cache while the block of A passes by.
//   streamed  A is packed, B is read where it is, in runs along n: few rows of C, or a short K.
//   dots      neither is packed: inner products along k, for few rows or columns of C.
#include "gemm.h"

#include <algorithm>

#include "../contract/activation_info.h"
#include "packing.h"
#include "parallel.h"
#include "workspace.h"

namespace fastmlp::cpu {
namespace {

// Few rows or columns of C are inner products: adding up the lanes of a vector for each element costs less than packing
// the larger operand, or than filling a few lanes of a tile. Longer sums bear more of them.
constexpr int64_t dot_rows = 8, most_dot_rows = 64;
constexpr int64_t dot_columns = 4, most_dot_columns = 16;
constexpr int64_t units_per_dot = 16;
// The smaller operand may be strided along k: so many elements are gathered first.
constexpr int64_t most_gathered = int64_t(1) << 18;

// Up to so many rows of C, or terms of its sums if these can be written as they are, B is streamed.
template <class S> constexpr int64_t streamed_rows = in_itself<S> ? 64 : 24;  // 16 bits are converted again

// What a block of B may take of an L2 cache, beside a block of A.
constexpr int64_t l2_share = 300 << 10;

// Sums of 16-bit products over several blocks of K: rows whose sums are kept at once.
constexpr int64_t summed_rows = 1024;

// No more parts than units: an empty part would share its beginning with another one.
int64_t most_parts(int64_t n, int64_t unit) { return std::max<int64_t>(1, ceil_divide(n, unit)); }

// The block of k is set by K alone: equal blocks rather than a short last one.
int64_t k_block(int64_t k, int64_t kc, int64_t unit) {
  return k <= kc ? k : round_up(ceil_divide(k, ceil_divide(k, kc)), unit);
}

enum class Path { packed, streamed, dots };

template <class S> bool few_rows(const Kernels<S>& kernels, int64_t m, int64_t k) {
  return m <= std::min(dot_rows + kernels.units(k) / units_per_dot, most_dot_rows);
}

template <class S> bool few_columns(const Kernels<S>& kernels, int64_t n, int64_t k) {
  return n <= std::min(dot_columns + kernels.units(k) / units_per_dot, most_dot_columns);
}

}  // namespace

template <class S>
bool goes_by_dots(const Kernels<S>& kernels, int64_t m, int64_t n, int64_t k, bool a_gapless, bool b_gapless) {
  const bool a_fits = a_gapless || m * k <= most_gathered;
  const bool b_fits = b_gapless || n * k <= most_gathered;
  // A short sum fills part of a vector; but for so few rows nothing is worth packing.
  if (k < kernels.lanes && (m > 2 || k == 0)) return false;
  return (few_rows(kernels, m, k) && b_gapless && a_fits) || (few_columns(kernels, n, k) && a_gapless && b_fits);
}

namespace {

template <class S> Path path_of(const Kernels<S>& kernels, const Product<S>& p) {
  const bool plain = p.a.form == Form::plain && p.b.form == Form::plain && !p.row_sums && !p.split_k;
  if (plain && goes_by_dots(kernels, p.m, p.n, p.k, p.a.k_stride == 1, p.b.k_stride == 1)) return Path::dots;
  // A short B is transposed first if need be.
  const bool short_sums = in_itself<S> && p.k <= streamed_depth && p.m > streamed_rows<S>;
  const bool long_runs = p.b.stride == 1 && p.m <= streamed_rows<S> && p.n >= 2 * kernels.nr;
  if (p.b.form == Form::plain && (short_sums || long_runs)) return Path::streamed;
  return Path::packed;
}

// Scratch of one thread; the sizes are those of the largest block that it will see.
template <class S> struct Scratch {
  using C = Compute<S>;
  C *a, *b, *tile, *bias, *sums, *panel_sums, *row_sums;
  S *staging, *run, *transposed_b, *gathered;

  Scratch(Carver& carver, const Kernels<S>& kernels, const Product<S>& p, Path path, int64_t m, int64_t n, int64_t k) {
    const int64_t kc = std::min(k, path == Path::streamed ? kernels.chain : kernels.kc);
    const int64_t units = kernels.units(kc);
    const int64_t mc = std::min(kernels.mc, round_up(m, kernels.mr));
    const int64_t nc = std::min(kernels.nc, round_up(n, kernels.nr));
    const bool packs_a = path != Path::dots, packs_b = path == Path::packed;
    a = packs_a ? carver.take<C>(mc * units + kernels.lanes) : nullptr;
    b = packs_b ? carver.take<C>(nc * units) : nullptr;
    const bool transposes_b = path == Path::streamed && p.b.stride != 1;
    transposed_b = transposes_b ? carver.take<S>(std::min(kernels.nc, n) * k + kernels.lanes) : nullptr;
    const int64_t strided = (p.a.k_stride == 1 ? 0 : m) + (p.b.k_stride == 1 ? 0 : n);
    gathered = path == Path::dots ? carver.take<S>(strided * k) : nullptr;
    tile = carver.take<C>(std::max(kernels.mr * kernels.nr, kernels.stream_rows * kernels.stream_columns));
    bias = p.bias.data ? carver.take<C>(path == Path::dots ? dot_bias_size(kernels) : nc) : nullptr;
    const bool keeps_sums = packs_a && !in_itself<S> && k > kc;
    sums = keeps_sums ? carver.take<C>(std::min(round_up(m, kernels.mr), summed_rows) * nc) : nullptr;
    panel_sums = p.row_sums ? carver.take<C>(kernels.mr + kernels.lanes) : nullptr;
    row_sums = p.row_sums ? carver.take<C>(m) : nullptr;
    const bool formed = p.a.form != Form::plain || p.b.form != Form::plain;
    const int64_t longest = std::max(std::max(mc, nc), kc);
    // Runs along k stage one panel; runs across k stage staged_k of them.
    staging = formed ? carver.take<S>(std::max(std::max(kernels.mr, kernels.nr) * kc, staged_k * longest)) : nullptr;
    run = formed ? carver.take<S>(2 * longest) : nullptr;
  }
};

}  // namespace

template <class S> int64_t dot_bias_size(const Kernels<S>& kernels) {
  return kernels.mr * std::max(most_dot_columns, kernels.nr);
}

template <class S>
void multiply_by_dots(const Kernels<S>& kernels, const Product<S>& p, Range m, Range n, const Operand<S>& a,
                      const Operand<S>& b, Compute<S>* tile, Compute<S>* bias) {
  // Each lane is a chain of its own.
  const int64_t kc = k_block(p.k, kernels.chain * kernels.lanes, kernels.k_unit);
  // Rows of C that follow each other without a gap are one run for the epilogue, whose vectors they fill.
  const bool one_run = p.n <= std::min(most_dot_columns, kernels.nr) && p.leading_dimension == p.n;
  Epilogue<S> e;
  e.tile = tile;
  e.sums = nullptr;
  e.sums_step = 0;
  e.leading_dimension = p.leading_dimension;
  e.scalars = p.activation.scalars;
  e.bias = p.bias.data ? bias : nullptr;
  const auto epilogue = kernels.activations[p.activation.kind].epilogue;
  for (int64_t j = n.begin; j < n.end; j += kernels.nr) {
    const int64_t columns = std::min(kernels.nr, n.end - j);
    e.tile_step = one_run ? columns : kernels.nr;
    if (e.bias) load_bias(kernels, p.bias, {j, j + columns}, bias);
    if (one_run && e.bias) {
      for (int64_t i = columns; i < std::min(kernels.mr, m.size()) * columns; i++) bias[i] = bias[i - columns];
    }
    for (int64_t i = m.begin; i < m.end; i += kernels.mr) {
      const int64_t rows = std::min(kernels.mr, m.end - i);
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

namespace {

// What one task computes: rows m and columns n of C, over range k of the sum.
template <class S> struct Assignment {
  Range m, n, k;
  // Where a chunk of K writes its share of C and of the row sums; null if K is whole.
  Compute<S>* share;
  Compute<S>* row_sums_share;
  bool owns_row_sums;  // of A's rows, which the tasks of other columns pack too
};

template <class S> class Task : Assignment<S> {
  using C = Compute<S>;
  using Assignment<S>::m, Assignment<S>::n, Assignment<S>::k;
  using Assignment<S>::share, Assignment<S>::row_sums_share, Assignment<S>::owns_row_sums;

 public:
  Task(const Kernels<S>& kernels, const Product<S>& product, const Scratch<S>& scratch, const Assignment<S>& assignment)
      : Assignment<S>(assignment), kernels(kernels), p(product), scratch(scratch) {}

  void run(Path path) {
    if (path == Path::dots) return dots();
    if (m.size() == 0 || (n.size() == 0 && !owns_row_sums)) return;
    path == Path::streamed ? streamed() : packed();
    if (owns_row_sums && !row_sums_share) kernels.narrow(m.size(), scratch.row_sums, p.row_sums + m.begin);
  }

 private:
  // Sums over the blocks of K so far, of element (i, j) of C and on.
  C* sums_at(int64_t i, int64_t j) const { return sums + (i - sums_row) * sums_step + (j - sums_column); }

  // (i, j) is the first sum where sums have a place of their own.
  void place_sums(int64_t i, int64_t j) {
    sums_row = sums_column = 0;
    if (share) {
      sums = share;
      sums_step = p.n;
    } else if constexpr (in_itself<S>) {  // in the result, until they are complete
      sums = p.output;
      sums_step = p.leading_dimension;
    } else {
      sums = scratch.sums;
      sums_step = std::min(kernels.nc, round_up(n.size(), kernels.nr));
      sums_row = i;
      sums_column = j;
    }
  }

  // Runs a kernel on one tile at (i, j) and what follows it.
  void finish(Microkernel<S> kernel, Tile<S>& tile, int64_t tile_step, int64_t i, int64_t j, int64_t rows, bool first,
              bool last) const {
    const int64_t at = i * p.leading_dimension + j;
    const C* const bias = p.bias.data ? scratch.bias + (j - bias_from) : nullptr;
    tile.output = nullptr;
    tile.add = !first;
    if (!first || share || !last) {
      tile.sums = sums_at(i, j);
      tile.sums_step = sums_step;
    }
    if (share || !last) return kernel(tile);
    if (!p.pre_activation && (p.activation.kind == identity_kind || p.activation.kind == relu_kind)) {
      tile.output = p.output + at;
      tile.leading_dimension = p.leading_dimension;
      tile.bias = bias;
      tile.relu = p.activation.kind == relu_kind;
      return kernel(tile);
    }
    tile.sums = scratch.tile;
    tile.sums_step = tile_step;
    tile.add = false;
    kernel(tile);
    Epilogue<S> e;
    e.tile = scratch.tile;
    e.tile_step = tile_step;
    e.rows = rows;
    e.columns = tile.columns;
    e.sums = first ? nullptr : sums_at(i, j);
    e.sums_step = sums_step;
    e.output = p.output + at;
    e.pre_activation = p.pre_activation ? p.pre_activation + at : nullptr;
    e.leading_dimension = p.leading_dimension;
    e.bias = bias;
    e.scalars = p.activation.scalars;
    kernels.activations[p.activation.kind].epilogue(e);
  }

  void take_bias(Range columns) {
    bias_from = columns.begin;
    if (p.bias.data) load_bias(kernels, p.bias, columns, scratch.bias);
  }

  void add_row_sums(Range rows, int64_t units, bool first) const {
    C* const out = row_sums_share ? row_sums_share : scratch.row_sums - m.begin;
    for (int64_t i = rows.begin; i < rows.end; i += kernels.mr) {
      std::fill(scratch.panel_sums, scratch.panel_sums + kernels.mr + kernels.lanes, C(0));
      kernels.panel_sums(units, scratch.a + (i - rows.begin) * units, scratch.panel_sums);
      const int64_t count = std::min(kernels.mr, rows.end - i);
      for (int64_t r = 0; r < count; r++) {
        out[i + r] = first ? scratch.panel_sums[r] : out[i + r] + scratch.panel_sums[r];
      }
    }
  }

  void packed() {
    const int64_t kc = k_block(k.size(), kernels.kc, kernels.k_unit);
    // Where sums have a place of their own it is small, and B is packed again for the next rows.
    const bool own_sums = !in_itself<S> && !share && k.size() > kc;
    const int64_t most_rows = own_sums ? summed_rows / kernels.mr * kernels.mr : m.size();
    int64_t jc = n.begin;
    do {  // once even without columns, for the row sums; likewise once without k, to write zeros
      const Range columns{jc, std::min(n.end, jc + kernels.nc)};
      take_bias(columns);
      for (int64_t from = m.begin; from < m.end; from += most_rows) {
        const Range rows{from, std::min(m.end, from + most_rows)};
        place_sums(from, jc);
        int64_t pc = k.begin;
        do {
          const Range depth{pc, std::min(k.end, pc + kc)};
          pack_block(kernels, p.b, columns, depth, kernels.nr, kernels.pack_b, scratch.staging, scratch.run, scratch.b);
          packed_block(rows, columns, depth);
          pc = depth.end;
        } while (pc < k.end);
      }
      jc = columns.end;
    } while (jc < n.end);
  }

  // What is read and written soon, after so many lines that were asked for: rows of A that are packed next, and rows of
  // C, while the products of those before them keep the core busy. Only what lies gapless in memory.
  const void* input_ahead(Range rows, Range depth, int64_t lines) const {
    if (rows.size() <= 0 || p.a.k_stride != 1 || p.a.stride != depth.size()) return nullptr;
    const int64_t bytes = rows.size() * p.a.stride * int64_t(sizeof(S));
    const int64_t units = kernels.units(depth.size());
    if (lines * line_bytes < bytes) {
      return reinterpret_cast<const char*>(p.a.data + rows.begin * p.a.stride + depth.begin) + lines * line_bytes;
    }
    if (p.a.form != Form::gradient || p.a.saved_k_stride != 1 || p.a.saved_stride != p.a.stride) return nullptr;
    lines -= round_up(ceil_divide(bytes, line_bytes), units);
    if (lines * line_bytes >= bytes) return nullptr;
    return reinterpret_cast<const char*>(p.a.saved + rows.begin * p.a.stride + depth.begin) + lines * line_bytes;
  }
  const void* output_ahead(Range rows, Range columns, int64_t lines) const {
    if (rows.size() <= 0 || share || p.leading_dimension != columns.size()) return nullptr;
    const int64_t bytes = rows.size() * p.leading_dimension * int64_t(sizeof(S));
    if (lines * line_bytes >= bytes) return nullptr;
    return reinterpret_cast<const char*>(p.output + rows.begin * p.leading_dimension) + lines * line_bytes;
  }

  // With the block of B packed.
  void packed_block(Range rows, Range columns, Range depth) const {
    const int64_t units = kernels.units(depth.size());
    const bool first = depth.begin == k.begin, last = depth.end == k.end;
    // A panel of B stays in the L1 cache while A passes by; but where all of B stays in the L2 cache, C is written
    // row by row, so that its next rows can be asked for in time.
    const bool along_rows = columns.size() * units * int64_t(sizeof(C)) <= l2_share;
    for (int64_t ic = rows.begin; ic < rows.end; ic += kernels.mc) {
      const Range block{ic, std::min(rows.end, ic + kernels.mc)};
      pack_block(kernels, p.a, block, depth, kernels.mr, kernels.pack_a, scratch.staging, scratch.run, scratch.a);
      if (owns_row_sums && columns.begin == n.begin) add_row_sums(block, units, first);
      const auto tile = [&](int64_t i, int64_t j) {
        const int64_t count = std::min(kernels.mr, block.end - i);
        Tile<S> t;
        t.k = units;
        t.a = scratch.a + (i - block.begin) * units;
        t.b = scratch.b + (j - columns.begin) * units;
        t.columns = std::min(kernels.nr, columns.end - j);
        const int64_t asked = (j - columns.begin) / kernels.nr * units;
        t.input_ahead = input_ahead({i + kernels.mc, std::min(rows.end, i + kernels.mc + kernels.mr)}, depth, asked);
        t.output_ahead = along_rows
                             ? output_ahead({i + kernels.mr, std::min(rows.end, i + 2 * kernels.mr)}, columns, asked)
                             : nullptr;
        finish(kernels.microkernel(count, t.columns), t, kernels.nr, i, j, count, first, last);
      };
      if (along_rows) {
        for (int64_t i = block.begin; i < block.end; i += kernels.mr) {
          for (int64_t j = columns.begin; j < columns.end; j += kernels.nr) tile(i, j);
        }
      } else {
        for (int64_t j = columns.begin; j < columns.end; j += kernels.nr) {
          for (int64_t i = block.begin; i < block.end; i += kernels.mr) tile(i, j);
        }
      }
    }
  }

  void streamed() {
    const int64_t kc = k_block(k.size(), kernels.chain, kernels.k_unit);
    int64_t jc = n.begin;
    do {
      const Range columns{jc, std::min(n.end, jc + kernels.nc)};
      take_bias(columns);
      place_sums(m.begin, jc);
      if (scratch.transposed_b) transpose_b(columns);
      int64_t pc = k.begin;
      do {
        const Range depth{pc, std::min(k.end, pc + kc)};
        for (int64_t ic = m.begin; ic < m.end; ic += kernels.mc) {
          streamed_block({ic, std::min(m.end, ic + kernels.mc)}, columns, depth);
        }
        pc = depth.end;
      } while (pc < k.end);
      jc = columns.end;
    } while (jc < n.end);
  }

  void transpose_b(Range columns) const {
    S* out = scratch.transposed_b;
    for (int64_t q = k.begin; q < k.end; q++, out += columns.size()) {
      gapless(p.b.data + columns.begin * p.b.stride + q * p.b.k_stride, p.b.stride, columns.size(), out);
    }
  }

  void streamed_block(Range rows, Range columns, Range depth) const {
    const int64_t units = kernels.units(depth.size());
    const bool first = depth.begin == k.begin, last = depth.end == k.end;
    pack_block(kernels, p.a, rows, depth, kernels.mr, kernels.pack_a, scratch.staging, scratch.run, scratch.a);
    if (owns_row_sums && columns.begin == n.begin) add_row_sums(rows, units, first);
    const auto tile = [&](int64_t i, int64_t j, int64_t count) {
      const int64_t panel = (i - rows.begin) / kernels.mr * kernels.mr;
      Tile<S> t;
      t.k = depth.size();
      t.a = scratch.a + panel * units + (i - rows.begin - panel);
      if (scratch.transposed_b) {
        t.unpacked_b = scratch.transposed_b + (j - columns.begin) + (depth.begin - k.begin) * columns.size();
        t.b_step = columns.size();
      } else {
        t.unpacked_b = p.b.data + j + depth.begin * p.b.k_stride;
        t.b_step = p.b.k_stride;
      }
      t.columns = std::min(kernels.stream_columns, columns.end - j);
      finish(kernels.stream_kernel(count, t.columns), t, kernels.stream_columns, i, j, count, first, last);
    };
    // Rows in groups that stay within a panel.
    const auto each_group = [&](const auto& visit) {
      for (int64_t panel = rows.begin; panel < rows.end; panel += kernels.mr) {
        const int64_t end = std::min(rows.end, panel + kernels.mr);
        for (int64_t i = panel; i < end; i += kernels.stream_rows) visit(i, std::min(kernels.stream_rows, end - i));
      }
    };
    // A short B is read again for each group of rows; of a long one, the columns that a group has read stay
    // in a cache for the next.
    if (depth.size() <= streamed_depth) {
      each_group([&](int64_t i, int64_t count) {
        for (int64_t j = columns.begin; j < columns.end; j += kernels.stream_columns) tile(i, j, count);
      });
    } else {
      for (int64_t j = columns.begin; j < columns.end; j += kernels.stream_columns) {
        each_group([&](int64_t i, int64_t count) { tile(i, j, count); });
      }
    }
  }

  // Rows of A, or columns of B, from `i` on, gapless along k. One of the two at most is not so already.
  Operand<S> gathered(const Operand<S>& x, Range i) const {
    Operand<S> rows = x;
    rows.data += i.begin * x.stride;
    if (x.k_stride == 1) return rows;
    S* out = scratch.gathered;
    for (int64_t r = 0; r < i.size(); r++, out += p.k) gapless(rows.data + r * x.stride, x.k_stride, p.k, out);
    rows.data = scratch.gathered;
    rows.stride = p.k;
    return rows;
  }

  void dots() { multiply_by_dots(kernels, p, m, n, gathered(p.a, m), gathered(p.b, n), scratch.tile, scratch.bias); }

  const Kernels<S>& kernels;
  const Product<S>& p;
  const Scratch<S>& scratch;
  C* sums = nullptr;
  int64_t sums_step = 0, sums_row = 0, sums_column = 0;
  int64_t bias_from = 0;  // the column that scratch.bias begins with
};

// How many chunks K is cut into: few tiles and a long K leave threads idle.
template <class S> int64_t chunks_of(const Product<S>& p) {
  constexpr int64_t largest_result = 1 << 17;
  return p.split_k && p.m * p.n <= largest_result ? chunks_of_rows(p.k) : 1;
}

struct Grid {
  int64_t rows, columns;
};

// The division of C among threads that takes least time: every thread packs its own A and B, one
// packed element costing about as much as `packing` multiply-adds of the micro-kernel.
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
  // Reading and writing an element costs time even where K is short.
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
  Scratch<S>(measure, kernels, p, path, m, n, longest_k);
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
    const Scratch<S> scratch(carver, kernels, p, path, m, n, longest_k);
    table.mark();
    Assignment<S> assignment{};
    assignment.m = part_of(p.m, kernels.mr, tile % grid.rows, grid.rows);
    assignment.n = part_of(p.n, kernels.nr, tile / grid.rows, grid.columns);
    assignment.k = chunks > 1 ? part_of(p.k, kernels.k_unit, chunk, chunks) : Range{0, p.k};
    assignment.share = chunks > 1 ? shares + chunk * result : nullptr;
    assignment.row_sums_share = chunks > 1 ? sum_shares + chunk * p.m : nullptr;
    // The first part of each row of the grid sums A's rows on the way.
    assignment.owns_row_sums = p.row_sums && tile / grid.rows == 0;
    Task<S>(kernels, p, scratch, assignment).run(path);
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

template int64_t dot_bias_size(const Kernels<float>&);
template int64_t dot_bias_size(const Kernels<double>&);
template void multiply_by_dots(const Kernels<float>&, const Product<float>&, Range, Range, const Operand<float>&,
                               const Operand<float>&, float*, float*);
template void multiply_by_dots(const Kernels<double>&, const Product<double>&, Range, Range, const Operand<double>&,
                               const Operand<double>&, double*, double*);
template bool goes_by_dots(const Kernels<float>&, int64_t, int64_t, int64_t, bool, bool);
template bool goes_by_dots(const Kernels<double>&, int64_t, int64_t, int64_t, bool, bool);
template void multiply<float>(const KernelTable&, const Product<float>&, int);
template void multiply<double>(const KernelTable&, const Product<double>&, int);
template void multiply<BFloat16>(const KernelTable&, const Product<BFloat16>&, int);
template void multiply<Float16>(const KernelTable&, const Product<Float16>&, int);

}  // namespace fastmlp::cpu

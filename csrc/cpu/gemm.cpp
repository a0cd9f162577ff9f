// Blocking, packing, split-K and threads of the product declared in gemm.h. Baseline code: it runs on
// every processor of the architecture, and leaves arithmetic to the kernels of the table.
#include "gemm.h"

#include <algorithm>

#include <omp.h>

#include "../activation_info.h"
#include "workspace.h"

namespace fastmlp::cpu {
namespace {

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_divide(a, b) * b; }

// Rows of a gradient that are formed at once when the batch runs along k: a staging block of this
// many rows of mc values stays in the L1 cache.
constexpr int64_t staged_k = 16;

// Up to so many rows or columns of C, operands are read in place rather than packed, where their layout
// allows it: as inner products (both gapless along k), or by the micro-kernel (B gapless along n).
constexpr int64_t dot_rows = 12;
constexpr int64_t dot_columns = 4;
// Each lane of an inner product is a chain of its own, so that its blocks of k may be longer than KC.
constexpr int64_t dot_depth = 4096;
constexpr int64_t unpacked_rows = 28;

// What a block of B may take of an L1 cache of 32 KiB or more.
constexpr int64_t l1_share = 24 << 10;

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The part-th of `parts` nearly equal ranges of [0, n), cut at multiples of `unit`.
Range part_of(int64_t n, int64_t unit, int64_t part, int64_t parts) {
  const int64_t units = ceil_divide(n, unit);
  return {std::min(n, units * part / parts * unit), std::min(n, units * (part + 1) / parts * unit)};
}

// No more parts than units: an empty part would share its beginning with another one.
int64_t most_parts(int64_t n, int64_t unit) { return std::max<int64_t>(1, ceil_divide(n, unit)); }

// The block of k is set by K alone: equal blocks rather than a short last one.
int64_t k_block(int64_t k, int64_t kc) { return k <= kc ? k : ceil_divide(k, ceil_divide(k, kc)); }

// Scratch of one thread; the sizes are those of the largest block that it will see.
template <class T> struct Scratch {
  T *a, *b, *tile, *bias, *staging, *run, *sums;

  Scratch(Carver& carver, const Kernels<T>& kernels, const Product<T>& p, int64_t m, int64_t n, int64_t k) {
    const int64_t kc = std::min(k, kernels.kc);
    const int64_t mc = std::min(kernels.mc, round_up(m, kernels.mr));
    const int64_t nc = std::min(kernels.nc, round_up(n, kernels.nr));
    a = carver.take<T>(mc * kc + kernels.lanes);
    b = carver.take<T>(nc * kc);
    tile = carver.take<T>(kernels.mr * kernels.nr);
    bias = p.bias.data ? carver.take<T>(nc) : nullptr;
    const bool formed = p.a.form != Form::plain || p.b.form != Form::plain;
    const int64_t longest = std::max(std::max(mc, nc), kc);
    // Runs along k stage one panel; runs across k stage staged_k of them.
    staging = formed ? carver.take<T>(std::max(std::max(kernels.mr, kernels.nr) * kc, staged_k * longest)) : nullptr;
    run = formed ? carver.take<T>(2 * longest) : nullptr;
    sums = p.row_sums ? carver.take<T>(kernels.mr + kernels.lanes) : nullptr;
  }
};

// n values that lie `stride` apart, as a gapless run: themselves, or copied to `buffer`.
template <class T> const T* gapless(const T* source, int64_t stride, int64_t n, T* buffer) {
  if (stride == 1) return source;
  for (int64_t i = 0; i < n; i++) buffer[i] = source[i * stride];
  return buffer;
}

template <class T>
void form_run(const Kernels<T>& kernels, const Operand<T>& x, int64_t at, int64_t saved_at, int64_t step,
              int64_t saved_step, int64_t n, T* buffer, T* out) {
  const ActivationKernels<T>& act = kernels.activations[x.activation.kind];
  const T* data = gapless(x.data + at, step, n, buffer);
  if (x.form == Form::value) {
    act.value(n, data, out, x.activation.scalars);
  } else {
    const T* saved = gapless(x.saved + saved_at, saved_step, n, buffer + n);
    act.gradient(n, data, saved, out, x.activation.scalars);
  }
}

// Packs rows `i` of A (or columns of B) times range `p` of k into panels `width` wide.
template <class T, class Pack>
void pack_block(const Kernels<T>& kernels, const Operand<T>& x, Range i, Range p, int64_t width, Pack pack,
                const Scratch<T>& scratch, T* panels) {
  const int64_t k = p.size();
  if (x.form == Form::plain) {
    for (int64_t j = i.begin; j < i.end; j += width) {
      pack(x.data + j * x.stride + p.begin * x.k_stride, x.stride, x.k_stride, std::min(width, i.end - j), k,
           panels + (j - i.begin) * k);
    }
  } else if (x.stride == 1) {
    // Runs across k: form a few rows of the block at a time, then deal them out to the panels.
    const int64_t n = i.size();
    for (int64_t q = p.begin; q < p.end; q += staged_k) {
      const int64_t count = std::min(staged_k, p.end - q);
      for (int64_t r = 0; r < count; r++) {
        form_run(kernels, x, i.begin * x.stride + (q + r) * x.k_stride,
                 i.begin * x.saved_stride + (q + r) * x.saved_k_stride, x.stride, x.saved_stride, n, scratch.run,
                 scratch.staging + r * n);
      }
      for (int64_t j = 0; j < n; j += width) {
        pack(scratch.staging + j, 1, n, std::min(width, n - j), count, panels + j * k + (q - p.begin) * width);
      }
    }
  } else {
    for (int64_t j = i.begin; j < i.end; j += width) {
      const int64_t count = std::min(width, i.end - j);
      for (int64_t r = 0; r < count; r++) {
        form_run(kernels, x, (j + r) * x.stride + p.begin * x.k_stride,
                 (j + r) * x.saved_stride + p.begin * x.saved_k_stride, x.k_stride, x.saved_k_stride, k, scratch.run,
                 scratch.staging + r * k);
      }
      pack(scratch.staging, k, 1, count, k, panels + (j - i.begin) * k);
    }
  }
}

template <class T> void load_bias(const Vector& bias, Range n, int64_t padded, T* out) {
  const T* source = static_cast<const T*>(bias.data);
  for (int64_t j = 0; j < n.size(); j++) out[j] = source[(n.begin + j) * bias.stride];
  std::fill(out + n.size(), out + padded, T(0));
}

// What a chunk of K writes: the result itself, or its share of the sum over chunks.
template <class T> struct Target {
  T* output;
  int64_t leading_dimension;
  T* row_sums;
};

template <class T>
void add_row_sums(const Kernels<T>& kernels, Range rows, int64_t k, bool first, const Scratch<T>& scratch, T* out) {
  for (int64_t i = rows.begin; i < rows.end; i += kernels.mr) {
    std::fill(scratch.sums, scratch.sums + kernels.mr + kernels.lanes, T(0));
    kernels.panel_sums(k, scratch.a + (i - rows.begin) * k, scratch.sums);
    const int64_t count = std::min(kernels.mr, rows.end - i);
    for (int64_t r = 0; r < count; r++) out[i + r] = first ? scratch.sums[r] : out[i + r] + scratch.sums[r];
  }
}

// One thread's share: rows m and columns n of C, range k of the sum.
template <class T>
void multiply_part(const KernelTable& table, const Product<T>& p, Range m, Range n, Range k, const Target<T>& target,
                   const Scratch<T>& scratch) {
  const Kernels<T>& kernels = kernels_of<T>(table);
  const bool sums = target.row_sums != nullptr;
  if (m.size() == 0 || (n.size() == 0 && !sums)) return;
  table.mark();
  const int64_t kc = k_block(k.size(), kernels.kc);
  Epilogue<T> e{};
  e.tile = scratch.tile;
  e.leading_dimension = target.leading_dimension;
  e.scalars = p.activation.scalars;
  const auto epilogue = kernels.activations[p.activation.kind].epilogue;

  int64_t jc = n.begin;
  do {  // once even without columns, for the row sums; likewise once without k, for the epilogue
    const Range columns{jc, std::min(n.end, jc + kernels.nc)};
    if (p.bias.data) load_bias(p.bias, columns, round_up(columns.size(), kernels.nr), scratch.bias);
    int64_t pc = k.begin;
    do {
      const Range depth{pc, std::min(k.end, pc + kc)};
      e.first = pc == k.begin;
      e.last = depth.end == k.end;
      // Nothing follows the products: most weight and input gradients.
      const bool bare = e.first && e.last && p.activation.kind == identity_kind && !p.bias.data && !p.pre_activation;
      // A panel of B stays in the L1 cache while A passes by; but where all of B fits, C is written row by
      // row, which spares the TLB and fills whole pages.
      const bool along_rows = columns.size() * depth.size() * int64_t(sizeof(T)) <= l1_share;
      // Full panels of B are read where they are if its rows are gapless and few rows of C use them.
      const bool in_place = p.b.form == Form::plain && p.b.stride == 1 && m.size() <= unpacked_rows;
      const int64_t in_place_end = in_place ? columns.begin + columns.size() / kernels.nr * kernels.nr : columns.begin;
      pack_block(kernels, p.b, {in_place_end, columns.end}, depth, kernels.nr, kernels.pack_b, scratch, scratch.b);
      for (int64_t ic = m.begin; ic < m.end; ic += kernels.mc) {
        const Range rows{ic, std::min(m.end, ic + kernels.mc)};
        pack_block(kernels, p.a, rows, depth, kernels.mr, kernels.pack_a, scratch, scratch.a);
        if (sums && jc == n.begin) {
          add_row_sums(kernels, rows, depth.size(), e.first, scratch, target.row_sums);
        }
        const auto tile = [&](int64_t i, int64_t j) {
          e.rows = std::min(kernels.mr, rows.end - i);
          e.columns = std::min(kernels.nr, columns.end - j);
          const T* a_panel = scratch.a + (i - rows.begin) * depth.size();
          const bool packed = j >= in_place_end;
          const T* b_panel =
              packed ? scratch.b + (j - in_place_end) * depth.size() : p.b.data + j + depth.begin * p.b.k_stride;
          const int64_t b_step = packed ? kernels.nr : p.b.k_stride;
          const Microkernel<T> microkernel = kernels.microkernel(e.rows, e.columns);
          const int64_t at = i * target.leading_dimension + j;
          e.output = target.output + at;
          if (bare && e.columns % kernels.lanes == 0) {
            microkernel(depth.size(), a_panel, b_panel, b_step, e.output, target.leading_dimension);
            return;
          }
          microkernel(depth.size(), a_panel, b_panel, b_step, scratch.tile, kernels.nr);
          e.pre_activation = p.pre_activation ? p.pre_activation + at : nullptr;
          e.bias = p.bias.data ? scratch.bias + (j - columns.begin) : nullptr;
          epilogue(e);
        };
        if (along_rows) {
          for (int64_t i = rows.begin; i < rows.end; i += kernels.mr) {
            for (int64_t j = columns.begin; j < columns.end; j += kernels.nr) tile(i, j);
          }
        } else {
          for (int64_t j = columns.begin; j < columns.end; j += kernels.nr) {
            for (int64_t i = rows.begin; i < rows.end; i += kernels.mr) tile(i, j);
          }
        }
      }
      pc = depth.end;
    } while (pc < k.end);
    jc = columns.end;
  } while (jc < n.end);
}

// Few rows or columns of C, with both operands gapless along K: a forward pass of a small batch, or
// of a layer with few outputs. Packing the larger operand would cost more than the product.
template <class T> bool fits_dots(const Kernels<T>& kernels, const Product<T>& p) {
  return (p.m <= dot_rows || p.n <= dot_columns) && p.k >= kernels.lanes && p.a.form == Form::plain &&
         p.b.form == Form::plain && p.a.k_stride == 1 && p.b.k_stride == 1 && !p.row_sums && !p.split_k;
}

template <class T>
void multiply_dots(const KernelTable& table, const Product<T>& p, Range m, Range n, const Scratch<T>& scratch) {
  const Kernels<T>& kernels = kernels_of<T>(table);
  table.mark();
  Epilogue<T> e{};
  e.tile = scratch.tile;
  e.leading_dimension = p.leading_dimension;
  e.scalars = p.activation.scalars;
  e.bias = p.bias.data ? scratch.bias : nullptr;
  const auto epilogue = kernels.activations[p.activation.kind].epilogue;
  const int64_t kc = k_block(p.k, dot_depth);
  for (int64_t j = n.begin; j < n.end; j += kernels.nr) {
    e.columns = std::min(kernels.nr, n.end - j);
    if (e.bias) load_bias(p.bias, {j, j + e.columns}, kernels.nr, scratch.bias);
    for (int64_t i = m.begin; i < m.end; i += kernels.mr) {
      e.rows = std::min(kernels.mr, m.end - i);
      const int64_t at = i * p.leading_dimension + j;
      e.output = p.output + at;
      e.pre_activation = p.pre_activation ? p.pre_activation + at : nullptr;
      // In blocks, which keeps the rounding errors of a long k apart.
      for (int64_t pc = 0; pc < p.k; pc += kc) {
        const int64_t depth = std::min(kc, p.k - pc);
        e.first = pc == 0;
        e.last = pc + depth == p.k;
        kernels.dot_tile(e.rows, e.columns, depth, p.a.data + i * p.a.stride + pc, p.a.stride,
                         p.b.data + j * p.b.stride + pc, p.b.stride, scratch.tile);
        epilogue(e);
      }
    }
  }
}

// How many chunks K is cut into: by the shape alone, so that results do not depend on threads. Few
// tiles and a long K leave threads idle; a chunk must outweigh adding its share of the result.
int64_t chunks_of(int64_t m, int64_t n, int64_t k) {
  constexpr int64_t most = 16, shortest = 1024, largest_result = 1 << 17;
  if (m * n > largest_result) return 1;
  return std::clamp<int64_t>(k / shortest, 1, most);
}

struct Grid {
  int64_t rows, columns;
};

// The division of C among threads that takes least time: every thread packs its own A and B, one
// packed element costing about as much as `packing` multiply-adds of the micro-kernel.
template <class T> Grid grid_of(const Kernels<T>& kernels, int64_t m, int64_t n, int64_t threads) {
  constexpr double packing = 8;
  Grid best{1, 1};
  double least = -1;
  const int64_t most_rows = most_parts(m, kernels.mr), most_columns = most_parts(n, kernels.nr);
  for (int64_t rows = 1; rows <= std::min(threads, most_rows); rows++) {
    const int64_t columns = std::min(threads / rows, most_columns);
    const double mt = double(ceil_divide(ceil_divide(m, kernels.mr), rows) * kernels.mr);
    const double nt = double(ceil_divide(ceil_divide(n, kernels.nr), columns) * kernels.nr);
    const double cost = mt * nt + packing * (mt + nt);
    if (least < 0 || cost < least) {
      least = cost;
      best = {rows, columns};
    }
  }
  return best;
}

// Runs task(i, slot) for i in [0, tasks), slot < threads; the calling thread alone if threads is 1.
template <class Task> void run_tasks(int64_t tasks, int threads, const Task& task) {
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; i++) task(i, 0);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int slot = omp_get_thread_num();
    for (int64_t i = slot; i < tasks; i += omp_get_num_threads()) task(i, slot);
  }
}

// out = the sum of `chunks` vectors that lie n apart, in order.
template <class T> void reduce_chunks(const T* shares, int64_t chunks, int64_t n, T* out) {
  std::copy(shares, shares + n, out);
  for (int64_t c = 1; c < chunks; c++) {
    const T* share = shares + c * n;
    for (int64_t i = 0; i < n; i++) out[i] += share[i];
  }
}

}  // namespace

int useful_threads(double multiply_adds, int threads) {
  // About 80 us of one core: waking a thread costs microseconds on an idle machine, but a time slice
  // where another process holds the core.
  constexpr double worth_a_thread = 1 << 22;
  if (threads <= 1 || omp_in_parallel()) return 1;
  return int(std::clamp(multiply_adds / worth_a_thread, 1.0, double(threads)));
}

template <class T> void multiply(const KernelTable& table, const Product<T>& p, int threads) {
  const Kernels<T>& kernels = kernels_of<T>(table);
  const int64_t chunks = p.split_k ? chunks_of(p.m, p.n, p.k) : 1;
  // Reading and writing an element costs time even where K is short.
  threads = useful_threads(double(p.m) * double(p.n) * double(p.k + 16), threads);
  const bool dots = fits_dots(kernels, p);
  const int64_t parts = std::max<int64_t>(1, threads / chunks);
  const Grid grid = !dots             ? grid_of(kernels, p.m, p.n, parts)
                    : p.m <= dot_rows ? Grid{1, std::min(parts, most_parts(p.n, kernels.nr))}
                                      : Grid{std::min(parts, most_parts(p.m, kernels.mr)), 1};
  const int64_t tiles = grid.rows * grid.columns;
  const int64_t tasks = tiles * chunks;
  threads = int(std::min<int64_t>(threads, tasks));

  const int64_t m = part_of(p.m, kernels.mr, grid.rows - 1, grid.rows).size();
  const int64_t n = part_of(p.n, kernels.nr, grid.columns - 1, grid.columns).size();
  const int64_t longest_k = ceil_divide(p.k, chunks);
  Carver measure;
  Scratch<T>(measure, kernels, p, m + kernels.mr, n + kernels.nr, longest_k);
  const size_t scratch_bytes = measure.used();
  const int64_t result = p.m * p.n;
  const size_t share_bytes = chunks > 1 ? size_t(chunks) * size_t(result + p.m) * sizeof(T) : 0;
  const Workspace workspace(scratch_bytes * size_t(threads) + share_bytes);
  T* const shares = reinterpret_cast<T*>(workspace.data() + scratch_bytes * size_t(threads));
  T* const sum_shares = shares + chunks * result;

  run_tasks(tasks, threads, [&](int64_t task, int slot) {
    const int64_t chunk = task / tiles;
    const int64_t tile = task % tiles;
    Carver carver(workspace.data() + scratch_bytes * size_t(slot));
    const Scratch<T> scratch(carver, kernels, p, m + kernels.mr, n + kernels.nr, longest_k);
    const Range rows = part_of(p.m, kernels.mr, tile % grid.rows, grid.rows);
    const Range columns = part_of(p.n, kernels.nr, tile / grid.rows, grid.columns);
    if (dots) {
      multiply_dots(table, p, rows, columns, scratch);
      return;
    }
    // The first part of each row of the grid sums A's rows on the way.
    const bool owns_sums = p.row_sums && tile / grid.rows == 0;
    Target<T> target{p.output, p.leading_dimension, owns_sums ? p.row_sums : nullptr};
    if (chunks > 1) {
      target = {shares + chunk * result, p.n, owns_sums ? sum_shares + chunk * p.m : nullptr};
    }
    const Range k = chunks > 1 ? part_of(p.k, 1, chunk, chunks) : Range{0, p.k};
    multiply_part(table, p, rows, columns, k, target, scratch);
  });
  if (chunks > 1) {
    reduce_chunks(shares, chunks, result, p.output);
    if (p.row_sums) reduce_chunks(sum_shares, chunks, p.m, p.row_sums);
  }
}

template void multiply<float>(const KernelTable&, const Product<float>&, int);
template void multiply<double>(const KernelTable&, const Product<double>&, int);

}  // namespace fastmlp::cpu

// One task of the macro-kernel: a block of C that one thread computes, the scratch it needs, where sums are kept
// between blocks of K, and what follows the products of a tile. Base of the tasks in gemm_packed.h and gemm_streamed.h,
// which gemm.cpp runs. Allocates nothing and starts no thread.
#pragma once

#include <algorithm>

#include "dots.h"
#include "epilogue.h"
#include "packing.h"
#include "product.h"
#include "workspace.h"

namespace fastmlp::cpu {

// How a product is computed; gemm.cpp describes the three ways.
enum class Path { packed, streamed, dots };

// Sums of 16-bit products over several blocks of K are kept in float32 for at most so many rows at once.
constexpr int64_t summed_rows = 1024;

// With so few rows of C, a B that no L2 cache holds is streamed in strips of so many elements of k, over all columns:
// memory then delivers each row of the strip in one long run, and setting the sums aside costs little.
constexpr int64_t strip_rows = 6, strip_depth = 16, strip_bytes = int64_t(1) << 20;

template <class S> bool goes_by_strips(const Product<S>& p) {
  return p.m <= strip_rows && p.n * p.k * int64_t(sizeof(S)) > strip_bytes;
}

// The most elements of k that a stream kernel sums at once.
template <class S> int64_t most_streamed(const Kernels<S>& kernels, const Product<S>& p) {
  return goes_by_strips(p) ? strip_depth : kernels.chain;
}

// Scratch of one thread, large enough for the largest block that it computes: m x n of C, over k of the sum.
template <class S> struct TaskScratch {
  using C = Compute<S>;
  C *a, *b, *tile, *bias, *sums, *panel_sums, *row_sums;
  S *staging, *run, *transposed_b, *gathered;

  TaskScratch(Carver& carver, const Kernels<S>& kernels, const Product<S>& p, Path path, int64_t m, int64_t n,
              int64_t k) {
    const int64_t kc = std::min(k, path == Path::streamed ? most_streamed(kernels, p) : kernels.kc);
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
    // What runs along k is staged a panel at a time, what runs across k in staged_k rows.
    staging = formed ? carver.take<S>(std::max(std::max(kernels.mr, kernels.nr) * kc, staged_k * longest)) : nullptr;
    run = formed ? carver.take<S>(2 * longest) : nullptr;
  }
};

// What one task computes: rows m and columns n of C, over range k of the sum.
template <class S> struct Assignment {
  Range m, n, k;
  // Where a chunk of K writes its share of C and of the row sums; null if K is whole.
  Compute<S>* share;
  Compute<S>* row_sums_share;
  bool owns_row_sums;  // whether this task sums the rows of A, which the tasks of other columns pack too
};

template <class S> class Task : protected Assignment<S> {
 public:
  Task(const Kernels<S>& kernels, const Product<S>& product, const TaskScratch<S>& scratch,
       const Assignment<S>& assignment)
      : Assignment<S>(assignment), kernels(kernels), p(product), scratch(scratch) {}

 protected:
  using C = Compute<S>;
  using Assignment<S>::m, Assignment<S>::n, Assignment<S>::k;
  using Assignment<S>::share, Assignment<S>::row_sums_share, Assignment<S>::owns_row_sums;

  // The sums over the blocks of K so far, from element (i, j) of C on.
  C* sums_at(int64_t i, int64_t j) const { return sums + (i - sums_row) * sums_step + (j - sums_column); }

  // Decides where sums are kept between blocks of K; (i, j) is the first of them.
  void place_sums(int64_t i, int64_t j) {
    sums_row = sums_column = 0;
    if (share) {
      sums = share;
      sums_step = p.n;
    } else if constexpr (in_itself<S>) {  // in the result itself, until they are complete
      sums = p.output;
      sums_step = p.leading_dimension;
    } else {
      sums = scratch.sums;
      sums_step = std::min(kernels.nc, round_up(n.size(), kernels.nr));
      sums_row = i;
      sums_column = j;
    }
  }

  // Runs a kernel on one tile at (i, j), and what follows its products.
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
    if (!p.pre_activation && !needs_epilogue(p.activation)) {
      tile.output = p.output + at;
      tile.leading_dimension = p.leading_dimension;
      tile.bias = bias;
      tile.relu = is_relu(p.activation);
      return kernel(tile);
    }
    tile.sums = scratch.tile;
    tile.sums_step = tile_step;
    tile.add = false;
    kernel(tile);
    kernels.activations[p.activation.kind].epilogue({
        .tile = scratch.tile,
        .tile_step = tile_step,
        .rows = rows,
        .columns = tile.columns,
        .sums = first ? nullptr : sums_at(i, j),
        .sums_step = sums_step,
        .output = p.output + at,
        .pre_activation = p.pre_activation ? p.pre_activation + at : nullptr,
        .leading_dimension = p.leading_dimension,
        .bias = bias,
        .scalars = p.activation.scalars,
    });
  }

  // Loads the bias of some columns of C, from which finish takes it.
  void take_bias(Range columns) {
    bias_from = columns.begin;
    if (p.bias.data) load_bias(kernels, p.bias, columns, scratch.bias);
  }

  // Adds up the rows of A that lie packed in scratch.a.
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

  const Kernels<S>& kernels;
  const Product<S>& p;
  const TaskScratch<S>& scratch;

 private:
  C* sums = nullptr;
  int64_t sums_step = 0, sums_row = 0, sums_column = 0;
  int64_t bias_from = 0;  // the column of C that scratch.bias begins with
};

}  // namespace fastmlp::cpu

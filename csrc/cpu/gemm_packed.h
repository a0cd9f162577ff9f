// The packed path of the macro-kernel: A and B are packed into panels, and the micro-kernel reads nothing else. Run by
// gemm.cpp for one task. Allocates nothing and starts no thread.
#pragma once

#include "gemm_task.h"

namespace fastmlp::cpu {

// What a block of B may take of an L2 cache, beside a block of A.
constexpr int64_t l2_share = 300 << 10;

template <class S> class PackedTask : Task<S> {
  using C = Compute<S>;
  using Task<S>::m, Task<S>::n, Task<S>::k, Task<S>::share, Task<S>::owns_row_sums;
  using Task<S>::kernels, Task<S>::p, Task<S>::scratch;
  using Task<S>::place_sums, Task<S>::take_bias, Task<S>::add_row_sums, Task<S>::finish;

 public:
  using Task<S>::Task;

  void run() {
    const int64_t kc = even_block(k.size(), kernels.kc, kernels.k_unit);
    // Sums of 16-bit products have a small place of their own, so that B is packed again for the next rows.
    const bool own_sums = !in_itself<S> && !share && k.size() > kc;
    const int64_t most_rows = own_sums ? summed_rows / kernels.mr * kernels.mr : m.size();
    int64_t jc = n.begin;
    do {  // once even if there are no columns, for the row sums; and once even if k is empty, to write zeros
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

 private:
  struct Ahead {
    const void* line = nullptr;
    int64_t step = line_bytes;
  };

  // What the tile at (i, j) prefetches of the rows of A that are packed after `block`, or nothing. The products of this
  // block keep the core busy meanwhile.
  Ahead input_ahead(Range rows, Range block, Range columns, Range depth, int64_t i, int64_t j) const {
    const int64_t first = i + kernels.mc;
    if (first >= rows.end) return {};
    const int64_t panel = (j - columns.begin) / kernels.nr;
    if (p.a.stride != 1) {
      return {
          along_k_ahead({first, std::min(rows.end, first + kernels.mr)}, depth, panel * kernels.units(depth.size()))};
    }
    // The last tiles of each panel of A prefetch one line of each row of the operand: the first of them what saved
    // gradients are computed from, the last one the operand.
    const int64_t left = (columns.size() - 1) / kernels.nr - panel;
    if (kernels.k_unit != 1 || left > (p.a.form == Form::gradient ? 1 : 0)) return {};
    const int64_t line = (i - block.begin) / kernels.mr * (line_bytes / int64_t(sizeof(S)));
    const int64_t at = block.end + line;
    if (at >= std::min(rows.end, block.end + kernels.mc)) return {};
    if (left == 0) return {p.a.data + at + depth.begin * p.a.k_stride, p.a.k_stride * int64_t(sizeof(S))};
    if (p.a.saved_stride != 1) return {};
    return {p.a.saved + at + depth.begin * p.a.saved_k_stride, p.a.saved_k_stride * int64_t(sizeof(S))};
  }

  // The next line to prefetch of rows of A that run along k, after so many lines that were prefetched before, or null.
  // Only rows that lie gapless in memory are prefetched, and after them what they saved.
  const void* along_k_ahead(Range rows, Range depth, int64_t lines) const {
    if (p.a.k_stride != 1 || p.a.stride != depth.size()) return nullptr;
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
  // Likewise of the rows of C that are written next.
  const void* output_ahead(Range rows, Range columns, int64_t lines) const {
    if (rows.size() <= 0 || share || p.leading_dimension != columns.size()) return nullptr;
    const int64_t bytes = rows.size() * p.leading_dimension * int64_t(sizeof(S));
    if (lines * line_bytes >= bytes) return nullptr;
    return reinterpret_cast<const char*>(p.output + rows.begin * p.leading_dimension) + lines * line_bytes;
  }

  // Rows and columns of C over one block of k, of which B lies packed in scratch.b.
  void packed_block(Range rows, Range columns, Range depth) const {
    const int64_t units = kernels.units(depth.size());
    const bool first = depth.begin == k.begin, last = depth.end == k.end;
    // A panel of B stays in the L1 cache while A passes by. But where all of B stays in the L2 cache, C is written row
    // by row, because its next rows can then be prefetched in time.
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
        const Ahead input = input_ahead(rows, block, columns, depth, i, j);
        t.input_ahead = input.line;
        t.input_step = input.step;
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
};

}  // namespace fastmlp::cpu

// The streamed path of the macro-kernel: A is packed, B is read where it lies, in runs along n. Run by gemm.cpp for one
// task with few rows of C or a short K. Allocates nothing and starts no thread.
#pragma once

#include "gemm_task.h"

namespace fastmlp::cpu {

template <class S> class StreamedTask : Task<S> {
  using Task<S>::m, Task<S>::n, Task<S>::k, Task<S>::owns_row_sums;
  using Task<S>::kernels, Task<S>::p, Task<S>::scratch;
  using Task<S>::place_sums, Task<S>::take_bias, Task<S>::add_row_sums, Task<S>::finish;

 public:
  using Task<S>::Task;

  void run() {
    const int64_t kc = even_block(k.size(), most_streamed(kernels, p), kernels.k_unit);
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

 private:
  // Copies a short B, so that each of its rows is a run of columns.
  void transpose_b(Range columns) const {
    S* out = scratch.transposed_b;
    for (int64_t q = k.begin; q < k.end; q++, out += columns.size()) {
      as_run(p.b.data + columns.begin * p.b.stride + q * p.b.k_stride, p.b.stride, columns.size(), out);
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
    // Visits rows in groups that stay within a panel.
    const auto each_group = [&](const auto& visit) {
      for (int64_t panel = rows.begin; panel < rows.end; panel += kernels.mr) {
        const int64_t end = std::min(rows.end, panel + kernels.mr);
        for (int64_t i = panel; i < end; i += kernels.stream_rows) visit(i, std::min(kernels.stream_rows, end - i));
      }
    };
    // A short B is read again for each group of rows. Of a long one, the columns that one group has read stay in a
    // cache for the next.
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
};

}  // namespace fastmlp::cpu

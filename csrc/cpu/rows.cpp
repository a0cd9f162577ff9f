// How passes over rows are shared among threads. Called through rows.h. Must stay baseline code: arithmetic is behind
// the table of the instruction set.
#include "rows.h"

#include <algorithm>

#include "dispatch.h"
#include "parallel.h"
#include "workspace.h"

namespace fastmlp::cpu {
namespace {

template <class F> void with_kernels(const RowsShape& shape, const F& f) {
  const KernelTable& table = active();
  table.mark();
  shape.dtype == DType::float64 ? f(*table.float64) : f(*table.float32);
}

template <class Run> void share(const RowsShape& shape, int threads, const Run& run) {
  share_rows(shape.rows, shape.rows * shape.columns, threads, run);
}

// The gradients of weight and bias are sums over rows, in chunks that follow from the shape alone.
template <class S> void backward_with(const Kernels<S>& kernels, const LayerNormBackwardPass& pass, int threads) {
  const int64_t rows = pass.shape.rows, columns = pass.shape.columns;
  S *weight = static_cast<S*>(pass.grad_weight), *bias = static_cast<S*>(pass.grad_bias);
  if (!weight && !bias) {
    share(pass.shape, threads,
          [&](int64_t begin, int64_t end) { kernels.layer_norm_backward(pass, begin, end, nullptr, nullptr); });
    return;
  }
  const int64_t chunks = chunks_of_rows(rows), asked = (weight ? columns : 0) + (bias ? columns : 0);
  const int64_t sums = chunks > 1 ? chunks * asked : 0;
  const Workspace workspace(size_t(sums) * sizeof(S));
  S* const memory = reinterpret_cast<S*>(workspace.data());
  std::fill_n(memory, sums, S(0));
  const auto place = [&](S* grad, int64_t chunk, int64_t offset) {
    return !grad || chunks == 1 ? grad : memory + chunk * asked + offset;
  };
  if (chunks == 1) {
    if (weight) std::fill_n(weight, columns, S(0));
    if (bias) std::fill_n(bias, columns, S(0));
  }
  threads = threads_for_elements(rows * columns, threads);
  run_tasks(chunks, threads, [&](int64_t i, int) {
    const Range part = part_of(rows, line_bytes, i, chunks);
    kernels.layer_norm_backward(pass, part.begin, part.end, place(weight, i, 0), place(bias, i, weight ? columns : 0));
  });
  if (chunks == 1) return;
  add_chunks(memory, chunks, asked);
  if (weight) std::copy_n(memory, columns, weight);
  if (bias) std::copy_n(memory + (weight ? columns : 0), columns, bias);
}

// Calls run(chunk, rows, columns) for chunks of rows, which follow from the shape alone, and, where these are fewer
// than the threads, for ranges of columns too: a column's sum does not depend on its neighbours.
template <class S, class Run> void share_columns(const RowsShape& shape, int64_t chunks, int threads, const Run& run) {
  threads = useful_threads(16.0 * double(shape.rows) * double(shape.columns), threads);
  const int64_t parts = ceil_divide(threads, chunks);
  run_tasks(chunks * parts, threads, [&](int64_t i, int) {
    run(i / parts, part_of(shape.rows, line_bytes, i / parts, chunks),
        part_of(shape.columns, line_bytes / int64_t(sizeof(S)), i % parts, parts));
  });
}

template <class S> void batch_norm_with(const Kernels<S>& kernels, const BatchNormPass& pass, int threads) {
  const BatchNormKernels<S>& kernel = *kernels.batch_norm;
  const int64_t columns = pass.shape.columns, chunks = pass.training ? chunks_of_rows(pass.shape.rows) : 1;
  const Workspace workspace(size_t(2 * chunks * columns) * sizeof(S));
  S* const means = reinterpret_cast<S*>(workspace.data());
  S* const squares = means + chunks * columns;  // and, of the first chunk, then the reciprocal deviations
  const S* mean = means;
  if (pass.training) {
    share_columns<S>(pass.shape, chunks, threads, [&](int64_t chunk, Range rows, Range some) {
      const int64_t at = chunk * columns + some.begin;
      const S* const x = static_cast<const S*>(pass.input) + rows.begin * columns + some.begin;
      kernel.add_rows(rows.size(), some.size(), columns, x, 0, means + at, squares + at);
    });
    for (int64_t i = 1; i < chunks; i++) {
      const Range rows = part_of(pass.shape.rows, line_bytes, i, chunks);
      kernel.join(columns, rows.begin, means, squares, rows.size(), means + i * columns, squares + i * columns);
    }
    kernel.settle(pass, means, squares);
  } else {
    mean = static_cast<const S*>(pass.running_mean);
    kernel.rstd(columns, static_cast<const S*>(pass.running_variance), pass.eps, squares);
  }
  if (!pass.output) return;
  share(pass.shape, threads, [&](int64_t begin, int64_t end) { kernel.normalise(pass, begin, end, mean, squares); });
}

template <class S>
void batch_norm_backward_with(const Kernels<S>& kernels, const BatchNormBackwardPass& pass, int threads) {
  const BatchNormKernels<S>& kernel = *kernels.batch_norm;
  const int64_t columns = pass.shape.columns, chunks = chunks_of_rows(pass.shape.rows);
  const Workspace workspace(size_t((2 * chunks + 1) * columns) * sizeof(S));
  S* const plain = reinterpret_cast<S*>(workspace.data());
  S *const scaled = plain + columns, *const own_rstd = plain + 2 * chunks * columns;
  const S* rstd = static_cast<const S*>(pass.rstd);
  if (!rstd) {
    kernel.rstd(columns, static_cast<const S*>(pass.running_variance), pass.eps, own_rstd);
    rstd = own_rstd;
  }
  const bool of_batch = pass.rstd;
  if (of_batch || pass.grad_weight || pass.grad_bias) {
    std::fill_n(plain, 2 * chunks * columns, S(0));
    share_columns<S>(pass.shape, chunks, threads, [&](int64_t chunk, Range rows, Range some) {
      const int64_t at = rows.begin * columns + some.begin, to = 2 * chunk * columns + some.begin;
      kernel.add_gradients(rows.size(), some.size(), columns, static_cast<const S*>(pass.grad) + at,
                           static_cast<const S*>(pass.input) + at, static_cast<const S*>(pass.mean) + some.begin,
                           plain + to, scaled + to);
    });
    add_chunks(plain, chunks, 2 * columns);
    kernel.settle_gradients(pass, rstd, plain, scaled);
  }
  if (!pass.grad_input) return;
  share(pass.shape, threads, [&](int64_t begin, int64_t end) {
    kernel.gradient(pass, begin, end, rstd, of_batch ? plain : nullptr, of_batch ? scaled : nullptr);
  });
}

}  // namespace

void layer_norm(const LayerNormPass& pass, int threads) {
  with_kernels(pass.shape, [&](const auto& kernels) {
    share(pass.shape, threads, [&](int64_t begin, int64_t end) { kernels.layer_norm(pass, begin, end); });
  });
}

void layer_norm_backward(const LayerNormBackwardPass& pass, int threads) {
  with_kernels(pass.shape, [&](const auto& kernels) { backward_with(kernels, pass, threads); });
}

void batch_norm(const BatchNormPass& pass, int threads) {
  with_kernels(pass.shape, [&](const auto& kernels) { batch_norm_with(kernels, pass, threads); });
}

void batch_norm_backward(const BatchNormBackwardPass& pass, int threads) {
  with_kernels(pass.shape, [&](const auto& kernels) { batch_norm_backward_with(kernels, pass, threads); });
}

void softmax(const SoftmaxPass& pass, int threads) {
  with_kernels(pass.shape, [&](const auto& kernels) {
    share(pass.shape, threads, [&](int64_t begin, int64_t end) { kernels.softmax(pass, begin, end); });
  });
}

void softmax_backward(const SoftmaxBackwardPass& pass, int threads) {
  with_kernels(pass.shape, [&](const auto& kernels) {
    share(pass.shape, threads, [&](int64_t begin, int64_t end) { kernels.softmax_backward(pass, begin, end); });
  });
}

int64_t softmax_columns() {
  // Torch's vectors have at least eight lanes.
  return std::min<int64_t>(most_softmax_columns, std::max<int64_t>(8, active().float32->lanes) - 1);
}

}  // namespace fastmlp::cpu

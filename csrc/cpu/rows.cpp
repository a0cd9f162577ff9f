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

// The gradients of weight and bias are sums over rows, in chunks that follow from the shape alone.
template <class S> void backward_with(const Kernels<S>& kernels, const LayerNormBackwardPass& pass, int threads) {
  const int64_t rows = pass.shape.rows, columns = pass.shape.columns;
  S *weight = static_cast<S*>(pass.grad_weight), *bias = static_cast<S*>(pass.grad_bias);
  if (!weight && !bias) {
    share_rows(pass.shape.rows, pass.shape.rows * pass.shape.columns, threads,
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

}  // namespace

void layer_norm(const LayerNormPass& pass, int threads) {
  with_kernels(pass.shape, [&](const auto& kernels) {
    share_rows(pass.shape.rows, pass.shape.rows * pass.shape.columns, threads,
               [&](int64_t begin, int64_t end) { kernels.layer_norm(pass, begin, end); });
  });
}

void layer_norm_backward(const LayerNormBackwardPass& pass, int threads) {
  with_kernels(pass.shape, [&](const auto& kernels) { backward_with(kernels, pass, threads); });
}

void softmax(const SoftmaxPass& pass, int threads) {
  with_kernels(pass.shape, [&](const auto& kernels) {
    share_rows(pass.shape.rows, pass.shape.rows * pass.shape.columns, threads,
               [&](int64_t begin, int64_t end) { kernels.softmax(pass, begin, end); });
  });
}

void softmax_backward(const SoftmaxBackwardPass& pass, int threads) {
  with_kernels(pass.shape, [&](const auto& kernels) {
    share_rows(pass.shape.rows, pass.shape.rows * pass.shape.columns, threads,
               [&](int64_t begin, int64_t end) { kernels.softmax_backward(pass, begin, end); });
  });
}

int64_t softmax_columns() {
  // Torch's vectors have at least eight lanes.
  return std::min<int64_t>(most_softmax_columns, std::max<int64_t>(8, active().float32->lanes) - 1);
}

}  // namespace fastmlp::cpu

// The loops of step.h. Baseline code; arithmetic is behind the table.
#include "step.h"

#include <algorithm>

#include "dispatch.h"
#include "parallel.h"

namespace fastmlp::cpu {
namespace {

// Elements that one task updates: their parameter, gradient and state fit in an L2 cache.
constexpr int64_t task_elements = 16 << 10;

struct Part {
  const Update* update;
  Range range;
};

void update_part(const KernelTable& table, const Part& part) {
  with_storage(part.update->dtype, [&](auto storage) {
    const auto& kernels = kernels_of<decltype(storage)>(table);
    kernels.update[int(part.update->spec.rule)](*part.update, part.range.begin, part.range.end);
  });
}

template <class S> double weight_of(const Kernels<S>& kernels, const S* weight, int64_t column) {
  Compute<S> one = 1;
  if (weight) kernels.widen(1, weight + column, &one);
  return double(one);
}

template <class S> double loss_of_elements(const Kernels<S>& kernels, const LossPass& pass) {
  const int64_t n = pass.rows * pass.columns;
  const double by = pass.spec.mean ? 1 / double(n) : 1;
  const auto* output = static_cast<const S*>(pass.output);
  const auto* target = static_cast<const S*>(pass.target);
  const auto* weight = static_cast<const S*>(pass.weight);
  auto* grad = static_cast<S*>(pass.grad);
  const Scalars scalars{pass.spec.delta, 0};
  const auto kernel = kernels.losses[pass.spec.kind];
  double sum = 0;
  if (!weight) {
    sum = kernel(n, output, target, nullptr, by / pass.spec.divisor, scalars, grad);
  } else {
    for (int64_t i = 0; i < n; i += pass.columns) {
      sum += kernel(pass.columns, output + i, target + i, weight, by / pass.spec.divisor, scalars, grad + i);
    }
  }
  return pass.spec.mean ? sum / double(n) : sum;
}

template <class S> double cross_entropy(const Kernels<S>& kernels, const LossPass& pass) {
  const auto* weight = static_cast<const S*>(pass.weight);
  double all = double(pass.columns), taken = 0;
  if (weight) {
    all = 0;
    for (int64_t c = 0; c < pass.columns; c++) all += weight_of(kernels, weight, c);
  }
  for (int64_t i = 0; i < pass.rows; i++) {
    if (pass.classes[i] != pass.spec.ignore_index) taken += weight_of(kernels, weight, pass.classes[i]);
  }
  const double scale = (pass.spec.mean ? 1 / taken : 1) / pass.spec.divisor;
  double sum = 0;
  for (int64_t i = 0; i < pass.rows; i++) {
    const auto* output = static_cast<const S*>(pass.output) + i * pass.columns;
    auto* grad = static_cast<S*>(pass.grad) + i * pass.columns;
    if (pass.classes[i] == pass.spec.ignore_index) {
      std::fill_n(grad, pass.columns, S{});
    } else {
      sum += kernels.cross_entropy(pass.columns, output, pass.classes[i], weight, all, pass.spec.label_smoothing, scale,
                                   grad);
    }
  }
  return pass.spec.mean ? sum / taken : sum;
}

}  // namespace

double loss(const LossPass& pass) {
  const KernelTable& table = active();
  table.mark();
  return with_storage(pass.dtype, [&](auto storage) {
    const auto& kernels = kernels_of<decltype(storage)>(table);
    return pass.spec.kind == cross_entropy_kind ? cross_entropy(kernels, pass) : loss_of_elements(kernels, pass);
  });
}

void update(const std::vector<Update>& updates, int threads) {
  const KernelTable& table = active();
  int64_t elements = 0;
  for (const Update& one : updates) elements += one.n;
  // Reading and writing an element takes as long as some multiply-adds of a product.
  threads = useful_threads(16.0 * double(elements), threads);
  table.mark();
  if (threads == 1) {
    for (const Update& one : updates) update_part(table, {&one, {0, one.n}});
    return;
  }
  std::vector<Part> parts;
  for (const Update& one : updates) {
    const int64_t count = ceil_divide(one.n, task_elements);
    for (int64_t i = 0; i < count; i++) parts.push_back({&one, part_of(one.n, line_bytes, i, count)});
  }
  run_tasks(int64_t(parts.size()), threads, [&](int64_t i, int) { update_part(table, parts[size_t(i)]); });
}

}  // namespace fastmlp::cpu

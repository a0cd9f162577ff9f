// The loss of a batch, a block of rows at a time, and its gradient. Used by step.cpp and row_blocks.cpp. Baseline code;
// arithmetic is behind the table.
#pragma once

#include <atomic>
#include <optional>

#include "../contract/training_info.h"
#include "kernel_table.h"
#include "parallel.h"

namespace fastmlp::cpu {

template <class S> class BatchLoss {
 public:
  BatchLoss(const Kernels<S>& kernels, const Targets& targets, int64_t rows, int64_t columns)
      : kernels(kernels),
        targets(targets),
        spec(targets.spec),
        columns(columns),
        info(loss_info(targets.spec.kind)),
        weight(static_cast<const S*>(targets.weight)) {
    count = double(rows * columns);
    if (info.takes_classes) {
      weights = double(columns);
      if (weight) {
        weights = 0;
        for (int64_t c = 0; c < columns; c++) weights += weight_of(c);
      }
      count = 0;
      for (int64_t i = 0; i < rows; i++) count += is_ignored(i) ? 0 : weight_of(targets.classes[i]);
    }
    scale = (spec.mean ? 1 / count : 1) / spec.divisor;
  }

  // The sum over some rows, whose outputs are given, gapless like the gradient that is written.
  double rows(Range range, const S* output, S* grad) const {
    if (info.takes_classes) return cross_entropy(range, output, grad);
    if (info.takes_probabilities && !(kernels.clip->largest(range.size() * columns, output) <= 1)) is_outside_ = true;
    const Scalars scalars{spec.number, 0};
    const auto kernel = kernels.losses[spec.kind];
    const S* target = static_cast<const S*>(targets.target) + range.begin * columns;
    if (!weight) return kernel(range.size() * columns, output, target, nullptr, scale, scalars, grad);
    double sum = 0;
    for (int64_t i = 0; i < range.size() * columns; i += columns) {
      sum += kernel(columns, output + i, target + i, weight, scale, scalars, grad + i);
    }
    return sum;
  }

  // The loss, from the sum over all rows. The mean of nothing is no number. None if it takes probabilities, and some
  // output is none.
  std::optional<double> of(double sum) const {
    if (is_outside_) return std::nullopt;
    return !spec.mean ? sum : (count == 0 ? 0.0 : sum) / count;
  }

 private:
  bool is_ignored(int64_t row) const { return targets.classes[row] == spec.ignore_index; }
  double weight_of(int64_t column) const {
    Compute<S> one = 1;
    if (weight) kernels.widen(1, weight + column, &one);
    return double(one);
  }

  double cross_entropy(Range range, const S* output, S* grad) const {
    double sum = 0;
    for (int64_t i = range.begin; i < range.end; i++, output += columns, grad += columns) {
      // An ignored row has a gradient of zero times its softmax: NaN where that is, as torch has it.
      const bool ignored = is_ignored(i);
      const double loss = kernels.cross_entropy(columns, output, ignored ? 0 : targets.classes[i], weight, weights,
                                                spec.number, ignored ? 0 : scale, grad);
      if (!ignored) sum += loss;
    }
    return sum;
  }

  const Kernels<S>& kernels;
  const Targets& targets;
  const LossSpec& spec;
  const int64_t columns;
  const LossInfo& info;
  const S* const weight;
  double weights = 0;                             // of all classes
  double count = 0;                               // what a mean divides by
  double scale = 1;                               // of the gradient
  mutable std::atomic<bool> is_outside_ = false;  // some output is no probability
};

}  // namespace fastmlp::cpu

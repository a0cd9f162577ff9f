// The losses that compare an output with a target element by element, each once: value and derivative with respect to
// the output. Included by every ISA file inside its target region, where M is that ISA's vector arithmetic; the rules
// of activation.h hold here too. Cross entropy, which sees a row at once, stands in cpu/losses.inl.
//
// y is the output, t the target, w the weight of positive targets (1 where there is none). `gradient` returns g times
// the derivative; g, which is small where the loss is a mean, comes first, so that products overflow where torch's do.
#pragma once

#include "problem.h"

namespace fastmlp {

struct MeanSquaredError {
  template <class M> static typename M::V value(typename M::V y, typename M::V t, typename M::V, Scalars) {
    const auto d = y - t;
    return d * d;
  }
  template <class M>
  static typename M::V gradient(typename M::V g, typename M::V y, typename M::V t, typename M::V, Scalars) {
    return M::fill(2) * g * (y - t);
  }
};

struct MeanAbsoluteError {
  template <class M> static typename M::V value(typename M::V y, typename M::V t, typename M::V, Scalars) {
    return M::abs(y - t);
  }
  template <class M>
  static typename M::V gradient(typename M::V g, typename M::V y, typename M::V t, typename M::V, Scalars) {
    const auto zero = M::fill(0);
    const auto d = y - t;
    return d > zero ? g : (d < zero ? -g : zero);
  }
};

// Huber, Robust estimation of a location parameter, 1964. The parameter is delta.
struct Huber {
  template <class M> static typename M::V value(typename M::V y, typename M::V t, typename M::V, Scalars p) {
    const auto half = M::fill(0.5), delta = M::fill(p.a);
    const auto d = M::abs(y - t);
    return d <= delta ? half * d * d : delta * (d - half * delta);
  }
  template <class M>
  static typename M::V gradient(typename M::V g, typename M::V y, typename M::V t, typename M::V, Scalars p) {
    const auto delta = M::fill(p.a);
    const auto d = y - t;
    return g * (d <= -delta ? -delta : (d >= delta ? delta : d));
  }
};

// Binary cross entropy of the sigmoid: (1 - t) y + (1 + (w - 1) t) log(1 + e^-y).
struct BinaryCrossEntropy {
  template <class M> static typename M::V value(typename M::V y, typename M::V t, typename M::V w, Scalars) {
    const auto one = M::fill(1), zero = M::fill(0);
    const auto soft = M::log1p_of_unit(M::exp(-M::abs(y))) + (y < zero ? -y : zero);
    return (one - t) * y + positive<M>(t, w) * soft;
  }
  template <class M>
  static typename M::V gradient(typename M::V g, typename M::V y, typename M::V t, typename M::V w, Scalars) {
    return g * (positive<M>(t, w) * M::sigmoid(y) - w * t);
  }
  // 1 + (w - 1) t, which is 1 without a weight, whatever t.
  template <class M> static typename M::V positive(typename M::V t, typename M::V w) {
    const auto one = M::fill(1);
    return w == one ? one : one + (w - one) * t;
  }
};

template <class... L> struct LossList {
  static constexpr int size = sizeof...(L);
};

// The order is the numbering that LossSpec::kind uses; cross entropy comes after them.
using Losses = LossList<MeanSquaredError, MeanAbsoluteError, Huber, BinaryCrossEntropy>;
constexpr int cross_entropy_kind = Losses::size;

template <class L, class... Others> constexpr int position_in(LossList<Others...>) {
  const bool same[] = {__is_same(L, Others)...};
  int position = 0;
  while (!same[position]) position++;
  return position;
}
template <class L> constexpr int loss_kind = position_in<L>(Losses{});

// As torch's module has it. The sum over the batch, or its mean, is divided by `divisor` too.
struct LossSpec {
  int kind = 0;
  bool mean = true;
  double delta = 1;            // Huber
  int64_t ignore_index = 0;    // cross entropy
  double label_smoothing = 0;  // cross entropy
  double divisor = 1;
};

// What the outputs of a batch are compared with; all gapless.
struct Targets {
  LossSpec spec;
  const void* target = nullptr;      // [rows, columns], or null
  const int64_t* classes = nullptr;  // [rows], of cross entropy, in range or ignore_index
  const void* weight = nullptr;      // null, or [columns]: of classes, or of positive targets
};

// Forward, loss and backward at once.
struct StepPass {
  BackwardPass backward;  // without grad_output, saved and grad_input
  Targets targets;
};

}  // namespace fastmlp

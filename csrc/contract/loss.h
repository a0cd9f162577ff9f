// The losses, each once: what of torch's module is read, and for those that compare an output with a target element by
// element, value and derivative with respect to the output. Included by every ISA file inside its target region, where
// M is that ISA's vector arithmetic; the rules of activation.h hold here too. The arithmetic of cross entropy, which
// needs a whole row at once, is in cpu/kernels/losses.inl.
//
// y is the output, t the target, w the weight of positive targets (1 where there is none). `gradient` returns g times
// the derivative; g, which is small where the loss is a mean, comes first, so that products overflow where torch's do.
#pragma once

#include "problem.h"

namespace fastmlp {

// A number that a loss reads of its module. Torch allows what lies between `least` and `most`.
struct LossNumber {
  const char* name = nullptr;
  double least = 0, most = 0;
  const char* expected = nullptr;  // the same in words, for errors
};

// What TrainStep reads of a module of torch.nn; what a loss does not have has no name.
struct LossInfo {
  const char* name = nullptr;        // of the class
  LossNumber number = {};            // the attribute that becomes LossSpec::number
  const char* index = nullptr;       // the attribute that becomes LossSpec::ignore_index
  const char* weight = nullptr;      // the buffer with a number for each column
  const char* unweighted = nullptr;  // a buffer that has to be None
  bool takes_classes = false;        // a target holds a class for each row, not a number for each element
  bool takes_probabilities = false;  // an output or a target that is none is an error
  const char* follows = nullptr;     // the activation or head of a model that it is taken after, if after one alone
};

struct MeanSquaredError {
  static constexpr LossInfo info = {.name = "MSELoss"};
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
  static constexpr LossInfo info = {.name = "L1Loss"};
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

// Huber, Robust estimation of a location parameter, 1964.
struct Huber {
  static constexpr LossInfo info = {.name = "HuberLoss",
                                    .number = {"delta", __DBL_DENORM_MIN__, __builtin_inf(), "a positive number"}};
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

// Girshick, Fast R-CNN, 2015. With beta = 0 it is the mean absolute error, also in what it makes of NaN.
struct SmoothL1 {
  static constexpr LossInfo info = {.name = "SmoothL1Loss",
                                    .number = {"beta", 0, __builtin_inf(), "a number of at least 0"}};
  template <class M> static typename M::V value(typename M::V y, typename M::V t, typename M::V, Scalars p) {
    const auto half = M::fill(0.5), beta = M::fill(p.a);
    const auto d = M::abs(y - t);
    return d < beta ? half * d * d / beta : d - half * beta;
  }
  template <class M>
  static typename M::V gradient(typename M::V g, typename M::V y, typename M::V t, typename M::V w, Scalars p) {
    if (p.a == 0) return MeanAbsoluteError::gradient<M>(g, y, t, w, p);
    const auto beta = M::fill(p.a);
    const auto d = y - t;
    return M::abs(d) >= beta ? MeanAbsoluteError::gradient<M>(g, y, t, w, p) : g * d / beta;
  }
};

// Binary cross entropy of the sigmoid: (1 - t) y + (1 + (w - 1) t) log(1 + e^-y).
struct BinaryCrossEntropy {
  static constexpr LossInfo info = {.name = "BCEWithLogitsLoss", .weight = "pos_weight", .unweighted = "weight"};
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

// Of probabilities. The logarithms are at least -100, and the divisor of the derivative at least 1e-12, a float, as
// torch has them. So it is not the loss above of what the sigmoid was taken of, where that saturates.
struct ProbabilityBinaryCrossEntropy {
  static constexpr LossInfo info = {
      .name = "BCELoss", .unweighted = "weight", .takes_probabilities = true, .follows = "sigmoid"};
  template <class M> static typename M::V value(typename M::V y, typename M::V t, typename M::V, Scalars) {
    return (t - M::fill(1)) * bounded<M>(M::log1p(-y)) - t * bounded<M>(M::log(y));
  }
  template <class M>
  static typename M::V gradient(typename M::V g, typename M::V y, typename M::V t, typename M::V, Scalars) {
    const auto least = M::fill(1e-12f), variance = (M::fill(1) - y) * y;
    return g * (y - t) / (variance < least ? least : variance);
  }
  template <class M> static typename M::V bounded(typename M::V log) {
    const auto least = M::fill(-100);
    return log < least ? least : log;
  }
};

struct CrossEntropy {
  static constexpr LossInfo info = {.name = "CrossEntropyLoss",
                                    .number = {"label_smoothing", 0, 1, "0 to 1"},
                                    .index = "ignore_index",
                                    .weight = "weight",
                                    .takes_classes = true};
};

// Of the logarithms of a softmax, which makes it the cross entropy of what that was taken of.
struct NegativeLogLikelihood {
  static constexpr LossInfo info = {
      .name = "NLLLoss", .index = "ignore_index", .weight = "weight", .takes_classes = true, .follows = "log_softmax"};
};

template <class... L> struct LossList {
  static constexpr int size = sizeof...(L);
};

// The order is the numbering that LossSpec::kind uses.
using Losses = LossList<MeanSquaredError, MeanAbsoluteError, Huber, SmoothL1, BinaryCrossEntropy, CrossEntropy,
                        ProbabilityBinaryCrossEntropy, NegativeLogLikelihood>;

// As torch's module has it. The sum over the batch, or its mean, is divided by `divisor` too.
struct LossSpec {
  int kind = 0;
  bool mean = true;
  double number = 0;         // what LossInfo::number names
  int64_t ignore_index = 0;  // of losses of classes
  double divisor = 1;
};

// What the outputs of a batch are compared with; all gapless.
struct Targets {
  LossSpec spec;
  const void* target = nullptr;      // [rows, columns], or null
  const int64_t* classes = nullptr;  // [rows], in range or ignore_index; of losses of classes
  const void* weight = nullptr;      // null, or [columns]: of classes, or of positive targets
};

// Forward, loss and backward at once.
struct StepPass {
  BackwardPass backward;  // without grad_output, saved and grad_input
  Targets targets;
};

}  // namespace fastmlp

// The torch-free contract of derivatives along a network's input: its outputs together with their first and second
// derivatives along axes of the input, and the gradients of these. Filled by tensors/derivatives.cpp, executed by
// cpu/derivatives.cpp. All is float32 or float64.
//
// A row of a layer has components: its value, its first derivatives along axes, and sums of its second derivatives
// along pairs of these axes. With z before an activation f and h after it, they go through a layer by
//   h = f(z),  h_i = f'(z) z_i,  h_s = f''(z) (the sum of z_i z_j over the pairs of s) + f'(z) z_s,
// which is Taylor's formula (Griewank and Walther, Evaluating Derivatives, 2008, chapter 13).
#pragma once

#include "problem.h"

namespace fastmlp {

// Two of the axes that there are first derivatives along, by their place in the list of these.
struct AxisPair {
  int first, second;
};

struct Directions {
  std::vector<int64_t> axes;    // features of the input that first derivatives are taken along
  std::vector<AxisPair> pairs;  // of all sums of second derivatives, one sum after the other
  std::vector<int> pairs_end;   // of each sum, where its pairs end

  int firsts() const { return int(axes.size()); }
  int seconds() const { return int(pairs_end.size()); }
  int components() const { return 1 + firsts() + seconds(); }
};

// Components follow each other in the order of Directions; each is [rows, layers.back().out_features].
struct DerivativesForward {
  Network network;
  Directions directions;
  // Null, or where to keep what backward reads: components before activations, kept_features (shape.h) for each
  // row and component. In what order they lie is the device's own.
  void* kept = nullptr;
  std::vector<void*> outputs;  // of each component, row-major without gaps
};

struct DerivativesBackward {
  BackwardPass pass;  // without grad_output and saved
  Directions directions;
  const void* kept = nullptr;
  std::vector<Matrix> grads;  // of each component; null is zero
};

}  // namespace fastmlp

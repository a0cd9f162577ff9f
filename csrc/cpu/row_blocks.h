// Depth fusion: blocks of rows go through several layers one after another, while what lies between the layers stays in
// a cache. For narrow layers, because their weights must fit there too. Called by network.cpp, which runs wide layers
// one by one, and by step.cpp. Divides rows into blocks, takes scratch and starts threads. Results do not depend on the
// number of threads.
#pragma once

#include <cstddef>
#include <vector>

#include "../contract/problem.h"
#include "batch_loss.h"
#include "kernel_table.h"

namespace fastmlp::cpu {

// Layers [first, end) of a network.
struct Layers {
  size_t first, end;
  bool narrow;  // whether the functions below compute them; otherwise this is one layer by itself
};

// Divides a whole network, from its first layer to its last, into layers that go together.
template <class S> std::vector<Layers> divide(const Network& network);

// Whether that makes one part, which is narrow.
template <class S> bool is_narrow_throughout(const Network& network);

// Where a layer writes its values of all rows, without gaps; null for what need not be kept.
template <class S> struct Place {
  S* output;  // before dropout
  S* pre_activation;
  S* dropped;  // the output after dropout
};

// In the functions below S is float or double, because layers of other dtypes are never narrow.
//
// Runs narrow layers on `rows` rows of input. places[l] belongs to layer l of the network; the last layer's output must
// have a place, after dropout if it drops.
template <class S>
void forward_blocks(const KernelTable& table, const Network& network, const Layers& layers, const Matrix& input,
                    int64_t rows, const Place<S>* places, int threads);

// Whether backward_blocks can read what the pass saved, where it lies.
bool gapless_for_blocks(const BackwardPass& pass, const Layers& layers);

// Computes the gradients of narrow layers that the pass asks for, from the gradient with respect to the last one's
// output; and, if grad_input is not null, the gradient with respect to the first one's input.
template <class S>
void backward_blocks(const KernelTable& table, const BackwardPass& pass, const Layers& layers,
                     const Matrix& grad_output, S* grad_input, int threads);

// Forward, loss and backward of a network whose layers are all narrow. What lies between them stays in a cache, and
// only gradients are written. Returns the sum of the losses.
template <class S>
double train_blocks(const KernelTable& table, const StepPass& pass, const BatchLoss<S>& loss, int threads);

}  // namespace fastmlp::cpu

// Depth fusion: blocks of rows go through several layers one after another while what lies between the layers stays
// in a cache. For narrow layers, whose weights fit there too. Called by network.cpp, which runs wide layers one by
// one; owns the division into blocks, scratch and threads. Results do not depend on the number of threads.
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
  bool narrow;  // computed by the functions below; else one layer by itself
};

// The whole network, from its first layer to its last.
template <class S> std::vector<Layers> divide(const Network& network);

// Where a layer writes, over all rows, gapless; null for what need not be kept.
template <class S> struct Place {
  S* output;
  S* pre_activation;
};

// S is a dtype that is computed in itself; others have no narrow layers.
//
// Runs narrow layers on `rows` rows of input; places[l] is that of layer l of the network. The output of the last one
// must have a place.
template <class S>
void forward_blocks(const KernelTable& table, const Network& network, const Layers& layers, const Matrix& input,
                    int64_t rows, const Place<S>* places, int threads);

// Whether backward_blocks can read what the pass saved, where it lies.
bool gapless_for_blocks(const BackwardPass& pass, const Layers& layers);

// The gradients of narrow layers that the pass asks for, from that of the last one's output; and, if grad_input is
// not null, the gradient of the first one's input.
template <class S>
void backward_blocks(const KernelTable& table, const BackwardPass& pass, const Layers& layers,
                     const Matrix& grad_output, S* grad_input, int threads);

// Forward, loss and backward, if all layers are narrow; what lies between them stays in a cache, and only gradients are
// written. Returns the sum of the losses.
template <class S>
double train_blocks(const KernelTable& table, const StepPass& pass, const BatchLoss<S>& loss, int threads);

}  // namespace fastmlp::cpu

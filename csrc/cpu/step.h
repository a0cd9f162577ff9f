// A step of training: forward, loss and backward at once, and the update of parameters. Called by register.cpp with
// pointers; decides which layers run how, knows neither tensors nor instruction sets.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "../contract/loss.h"
#include "../contract/update.h"

namespace fastmlp::cpu {

// What `train` needs of the caller's memory, besides its own scratch: outputs of wide layers for the batch.
size_t train_bytes(const StepPass& pass);

// Returns the loss and writes the gradients of the pass. float32 and float64. No loss if it takes probabilities, and
// some output is none.
std::optional<double> train(const StepPass& pass, void* memory, int threads);

// All updates; their parts do not depend on each other, so the bits do not depend on the number of threads.
void update(const std::vector<Update>& updates, int threads);

}  // namespace fastmlp::cpu

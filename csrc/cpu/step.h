// What a training step does besides its two passes: the loss and its gradient, and the update of parameters. Called by
// register.cpp with pointers; owns the division of work, knows neither tensors nor instruction sets.
#pragma once

#include <vector>

#include "../loss.h"
#include "../update.h"

namespace fastmlp::cpu {

// The loss of a batch; writes its gradient. `classes` are in range or ignore_index.
double loss(const LossPass& pass);

// All updates; the parts do not depend on each other, so the bits do not depend on the number of threads.
void update(const std::vector<Update>& updates, int threads);

}  // namespace fastmlp::cpu

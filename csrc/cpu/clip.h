// Norms of gradients, and what clipping makes of gradients. Called by register.cpp with pointers; knows neither tensors
// nor instruction sets. Bits do not depend on the number of threads.
#pragma once

#include <vector>

#include "../contract/clip.h"

namespace fastmlp::cpu {

// That of all elements together.
double gradient_norm(const std::vector<Gradient>& gradients, NormOrder order, int threads);

void scale_gradients(const std::vector<Gradient>& gradients, double factor, int threads);

// To at least -limit, then to at most limit.
void clamp_gradients(const std::vector<Gradient>& gradients, double limit, int threads);

}  // namespace fastmlp::cpu

// How the CPU runs a network: which layers go together, which products are computed in which order. Called by
// register.cpp and step.cpp, with pointers; knows neither tensors nor instruction sets.
#pragma once

#include "../contract/problem.h"

namespace fastmlp::cpu {

// Both throw std::bad_alloc before anything is written if scratch memory cannot be had.
void forward(const ForwardPass& pass, int threads);
void backward(const BackwardPass& pass, int threads);

}  // namespace fastmlp::cpu

// How the CPU runs a network: which products, in which order, on how many threads. Called by
// register.cpp with pointers; knows neither tensors nor instruction sets.
#pragma once

#include "../contract/problem.h"

namespace fastmlp::cpu {

// Both throw std::bad_alloc before anything is written if scratch memory cannot be had.
void forward(const ForwardPass& pass, int threads);
void backward(const BackwardPass& pass, int threads);

}  // namespace fastmlp::cpu

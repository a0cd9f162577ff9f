// How a GPU runs a network: which kernels, in which order, with which scratch memory. Called by register.cpp, and by
// the tests' extension in the emulator, with pointers of the device; knows no tensors and never waits for the device.
#pragma once

#include "../contract/problem.h"
#include "products.h"

namespace fastmlp::cuda {

// Null, or why the current device cannot run the kernels.
const char* obstacle();

// Both throw std::runtime_error for a launch that fails, and whatever `allocate` throws.
void forward(const Context& context, const ForwardPass& pass);
void backward(const Context& context, const BackwardPass& pass);

}  // namespace fastmlp::cuda

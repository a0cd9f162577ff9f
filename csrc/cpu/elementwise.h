// Elementwise programs on the CPU: one pass over memory, in blocks that stay in the first cache, by instructions that
// are interpreted for a whole block each. Called by register.cpp. How a space is gone through is decided in
// elementwise_plan.h.
#pragma once

#include <memory>

#include "../contract/elementwise.h"

namespace fastmlp::cpu {

// `threads` tells how many may be used; it is asked where more than one is worth while.
std::unique_ptr<ElementwiseRun> plan_elements(const ElementProgram& program, int (*threads)());

}  // namespace fastmlp::cpu

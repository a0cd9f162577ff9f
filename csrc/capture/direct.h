// Operators that make up most of a step, called without the dispatcher and without boxes. tape.cpp asks for one when a
// call is added. Must compute exactly what the operator's kernel for the CPU does, because it is that kernel.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

namespace fastmlp {

// Reads the arguments where they lie and leaves them there.
using Direct = void(torch::jit::Stack& arguments);

// Null if there is none for the operator.
Direct* direct_call(const c10::OperatorName& name);

}  // namespace fastmlp

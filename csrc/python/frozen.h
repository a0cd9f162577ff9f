// The class _C.Frozen, from which fastmlp.FrozenMLP derives: a network that was packed once, and a call that costs
// little besides the products. Added by bindings.cpp; fastmlp/frozen.py reads models and fills it. Has no gradients.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fastmlp {

// Adds the class to the module.
void add_frozen(py::module_& module);

}  // namespace fastmlp

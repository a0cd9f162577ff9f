// Measures, on the device, which tile or the library is the fastest for a product. Called by register.cpp where the
// user asked for it: it waits for the device, so never while a graph is captured.
#pragma once

#include "products.h"

namespace fastmlp::cuda {

// `random` gives memory of so many elements of the key's dtype with values from -1 to 1, which stays until the next
// passes have run. Throws std::runtime_error if a launch or an event fails.
TileSize fastest(const Context& context, const ProductKey& key, const std::function<void*(int64_t elements)>& random);

}  // namespace fastmlp::cuda

// Measures on the device which tile, or the library, is the fastest for a product. Called by register.cpp if the user
// asked for it, but never while a CUDA graph is captured, because it waits for the device.
#pragma once

#include "products.h"

namespace fastmlp::cuda {

// Returns memory of so many elements of the key's dtype, with values from -1 to 1; it stays valid until fastest() has
// returned.
using Random = std::function<void*(int64_t elements)>;
// Queues work on the context's stream that takes the device so many clocks and the host hardly any time.
using Occupy = std::function<void(int64_t clocks)>;

// None if the host is too slow to queue what is timed ahead of the device. Throws std::runtime_error if a launch or an
// event fails.
std::optional<TileSize> fastest(const Context& context, const ProductKey& key, const Random& random,
                                const Occupy& occupy);

}  // namespace fastmlp::cuda

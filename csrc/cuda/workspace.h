// Scratch memory of one pass: one block, which the caller's allocator gives, cut into pieces. Used by network.cu and
// narrow.cu, which describe a pass once, to be measured and to be run.
#pragma once

#include "../contract/carver.h"
#include "products.h"

namespace fastmlp::cuda {

using Carver = CarverOf<256>;

// Runs `pass(carver, false)` to add up its memory, allocates that, and runs `pass(carver, true)`.
template <class Pass> void with_memory(const Context& context, const Pass& pass) {
  Carver measure;
  pass(measure, false);
  Carver carver(measure.used() > 0 ? context.allocate(measure.used()) : nullptr);
  pass(carver, true);
}

}  // namespace fastmlp::cuda

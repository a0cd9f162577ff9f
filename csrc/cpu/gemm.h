// The macro-kernel: products of wide layers, with cache blocking, packing, split-K and threads. Called by network.cpp
// for forward, dgrad and wgrad, and by matrix_product.cpp for products of tapes. Takes its scratch before it starts
// threads, and leaves all arithmetic to the kernels of the table.
#pragma once

#include <cstdint>

#include "product.h"

namespace fastmlp::cpu {

// With so short a K, packing B and writing the result cost more than the products do. So B is read where it is, and
// the result is written in long runs.
constexpr int64_t streamed_depth = 8;

// The result has the same bits for any number of threads.
template <class S> void multiply(const KernelTable& table, const Product<S>& product, int threads);

}  // namespace fastmlp::cpu

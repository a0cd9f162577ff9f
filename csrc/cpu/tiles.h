// The register tiles and cache blocks of every instruction set and dtype, in one place. Read by the ISA files. Sizes
// count elements; gemm.cpp says what is kept in which cache. They were chosen by measurement: `make tiles` prints the
// rates of other cache blocks.
#pragma once

#include "kernel_table.h"

namespace fastmlp::cpu {

struct Tiles {
  int mr;       // rows of the register tile
  int vectors;  // vectors in a row of it: NR is so many times the lanes of a vector
  int64_t mc;   // where nothing is known of the L2 cache, from whose size dispatch.h takes it
  int64_t nc;
  int64_t kc;     // in units, of k_unit elements each
  int64_t chain;  // units that are summed one after another; rounding errors grow with its square root
  int stream_rows, stream_vectors;  // the tile of the kernels that read B in place
};

// As many lanes of Compute<S> as fill so many bytes.
template <class S> constexpr int64_t lanes_in(int64_t bytes) { return bytes / int64_t(sizeof(Compute<S>)); }

// Of 16 registers, 12 hold the tile.
template <class S> constexpr Tiles tiles_of_avx2 = {6, 2, 8 * 6, lanes_in<S>(4096), lanes_in<S>(4096), 192, 3, 4};

// As AVX2. Without FMA each product is rounded too, which a shorter chain makes up for.
template <class S> constexpr Tiles tiles_of_portable = {6, 2, 8 * 6, lanes_in<S>(4096), lanes_in<S>(4096), 96, 3, 4};

// Of 32 registers, 28 hold the tile.
template <class S> constexpr Tiles tiles_of_avx512 = {14, 2, 6 * 14, lanes_in<S>(4096), lanes_in<S>(4096), 192, 3, 8};

}  // namespace fastmlp::cpu

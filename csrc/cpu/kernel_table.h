// The contract between baseline code (gemm.cpp, network.cpp, dispatch.cpp) and the ISA files: one
// table of function pointers and tile sizes per instruction set. Sizes count elements.
//
//            NR columns of B                  A panel: k groups of MR values, one per row
//         +-------------------+               B panel: k groups of NR values, one per column
//      MR | tile = A * B      |               tile:    MR x NR, row-major, NR apart
//  rows   +-------------------+               Panels are zero-padded to full MR and NR.
//
// A leaf function works on one panel, tile or run; it starts no thread and allocates nothing.
#pragma once

#include "../problem.h"

namespace fastmlp::cpu {

// What follows the products of one tile: sums over the blocks of K before this one are read back
// from `output`; after the last block bias and activation are applied.
template <class T> struct Epilogue {
  const T* tile;
  int64_t rows;     // <= MR
  int64_t columns;  // <= NR
  T* output;
  T* pre_activation;  // null, or where to keep the pre-activation
  int64_t leading_dimension;
  const T* bias;  // null, or NR values
  bool first;     // no earlier block of K
  bool last;
  Scalars scalars;
};

template <class T> struct ActivationKernels {
  void (*epilogue)(const Epilogue<T>&);
  // out[i] = g[i] * act'(saved[i]); out may be g.
  void (*gradient)(int64_t n, const T* g, const T* saved, T* out, Scalars);
  // out[i] = act(pre[i]).
  void (*value)(int64_t n, const T* pre, T* out, Scalars);
};

// tile = the products of one panel of A and NR columns of B, whose rows lie b_step apart: NR where B
// is packed, and B's own distance where packing would not pay. Rows of the tile lie tile_step apart: it
// may be a part of the result itself, where nothing follows the products.
template <class T>
using Microkernel = void (*)(int64_t k, const T* a, const T* b, int64_t b_step, T* tile, int64_t tile_step);

template <class T> struct Kernels {
  int64_t mr, nr;      // register tile
  int64_t mc, nc, kc;  // cache blocks: mc a multiple of mr, nc of nr
  int64_t lanes;       // elements of one vector; buffers may be read this far past their end
  // panel[p * width + i] = source[i * stride + p * k_stride], zero for i >= count.
  void (*pack_a)(const T* source, int64_t stride, int64_t k_stride, int64_t count, int64_t k, T* panel);
  void (*pack_b)(const T* source, int64_t stride, int64_t k_stride, int64_t count, int64_t k, T* panel);
  // One for each number of rows and of vectors per row that hold anything; see microkernel().
  const Microkernel<T>* microkernels;
  // tile = rows of A times columns of B, without packing: both are gapless along k. At most MR x NR.
  void (*dot_tile)(int64_t rows, int64_t columns, int64_t k, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                   T* tile);
  // sums[i] += sum over p of panel[p * mr + i]; sums holds mr + lanes values.
  void (*panel_sums)(int64_t k, const T* panel, T* sums);
  const ActivationKernels<T>* activations;

  Microkernel<T> microkernel(int64_t rows, int64_t columns) const {
    const int64_t vectors = (columns + lanes - 1) / lanes;
    return microkernels[(rows - 1) * (nr / lanes) + vectors - 1];
  }
};

// What a table needs; decode_features (dispatch.h) tells what there is.
enum Feature : unsigned {
  feature_avx2_fma = 1u << 0,
  feature_avx512 = 1u << 1,  // F, DQ, BW, VL
};

struct KernelTable {
  const char* name;
  const char* description;
  unsigned needs;
  Kernels<float> float32;
  Kernels<double> float64;
  // Records `name` for the calling thread, from inside the ISA's own file: tests prove by it that
  // the ISA that was asked for is the one that ran.
  void (*mark)();
};

template <class T> const Kernels<T>& kernels_of(const KernelTable& table);
template <> inline const Kernels<float>& kernels_of(const KernelTable& table) { return table.float32; }
template <> inline const Kernels<double>& kernels_of(const KernelTable& table) { return table.float64; }

// Set by KernelTable::mark.
extern thread_local const char* last_isa;

}  // namespace fastmlp::cpu

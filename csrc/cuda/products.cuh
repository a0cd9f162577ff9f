// Behind products.h, for one dtype: from a product to the kernel that fits it, and its launch. Included once for each
// dtype by the files of dtypes/, which nvcc compiles, and the host compiler for the emulator.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "products.h"
#include "rows.cuh"
#include "simt.cuh"
#include "tiles.h"

namespace fastmlp::cuda {
namespace {

constexpr int64_t most_blocks = 0x7fffffff;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check(const char* error, const char* kernel, int64_t m, int64_t n, int64_t k) {
  if (!error) return;
  throw std::runtime_error("fastmlp: CUDA kernel " + std::string(kernel) + " failed for M = " + std::to_string(m) +
                           ", N = " + std::to_string(n) + ", K = " + std::to_string(k) + ": " + error);
}

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <class S> bool reads_along_k(const Operand<S>& x, int64_t k, int64_t part) {
  constexpr int64_t vector = per_16_bytes<S>;
  return x.k_stride == 1 && x.stride % vector == 0 && k % vector == 0 && part % vector == 0 && aligned(x.data, 16);
}

template <class S> bool reads_along_rows(const Operand<S>& x, int64_t size) {
  constexpr int64_t vector = per_16_bytes<S>;
  return x.stride == 1 && x.k_stride % vector == 0 && size % vector == 0 && aligned(x.data, 16);
}

// Whether the epilogue can take four elements at a time.
template <class S> bool takes_vectors(const Product<S>& p) {
  constexpr size_t bytes = std::min<size_t>(16, 4 * sizeof(S));
  return p.n % 4 == 0 && aligned(p.output, bytes) && aligned(p.pre_activation, bytes) && aligned(p.partials, 16) &&
         (!p.saved || (p.saved_column_stride == 1 && p.saved_stride % 4 == 0 && aligned(p.saved, bytes)));
}

template <class S, class Tile, Read read_a, Read read_b, Epilogue epilogue>
void launch_simt(const Context& context, const Plan& plan, const Product<S>& p) {
  const dim3 grid(unsigned(plan.row_tiles * plan.column_tiles), 1, unsigned(plan.parts));
  const char* const error = launch(simt_product<S, Tile, read_a, read_b, epilogue>, grid, dim3(Tile::threads), 0,
                                   context.stream, p);
  check(error, "simt_product", p.m, p.n, p.k);
}

template <class S> constexpr bool sixteen_bits = sizeof(S) == 2;

// Vectors are along k for both operands of forward (NT), for the first of dgrad (NN), for none of wgrad (TN).
template <class S, class Tile, Epilogue epilogue>
void launch_simt_tile(const Context& context, const Plan& plan, const Product<S>& p) {
  if constexpr (!sixteen_bits<S>) {
    constexpr Read read_a = epilogue == Epilogue::wgrad ? Read::along_rows : Read::along_k;
    constexpr Read read_b = epilogue == Epilogue::forward ? Read::along_k : Read::along_rows;
    const bool a_fits = read_a == Read::along_k ? reads_along_k(p.a, p.k, plan.part) : reads_along_rows(p.a, p.m);
    const bool b_fits = read_b == Read::along_k ? reads_along_k(p.b, p.k, plan.part) : reads_along_rows(p.b, p.n);
    if (a_fits && b_fits) return launch_simt<S, Tile, read_a, read_b, epilogue>(context, plan, p);
  }
  launch_simt<S, Tile, Read::elements, Read::elements, epilogue>(context, plan, p);
}

// The tiles behind the sizes of tiles.h; 128 x 128 is for float32 only.
template <class S> struct SimtTiles {
  using Large = SimtTile<128, 128, 8, 8, 8>;
  using Medium = SimtTile<64, 64, 16, 4, 4>;
  using Small = SimtTile<32, 32, 16, 4, 4>;
};
template <> struct SimtTiles<double> {
  using Large = SimtTile<64, 64, 16, 4, 4>;
  using Medium = Large;
  using Small = SimtTile<32, 32, 16, 4, 4>;
};

template <class S, Epilogue epilogue> void launch_product(const Context& context, const Plan& plan, const Product<S>& p) {
  using Tiles = SimtTiles<S>;
  switch (plan.tile) {
    case large_tile:
      return launch_simt_tile<S, typename Tiles::Large, epilogue>(context, plan, p);
    case medium_tile:
      return launch_simt_tile<S, typename Tiles::Medium, epilogue>(context, plan, p);
    default:
      return launch_simt_tile<S, typename Tiles::Small, epilogue>(context, plan, p);
  }
}

struct TileShape {
  int64_t bm, bn, bk;
};
template <class Tile> constexpr TileShape shape_of = {Tile::BM, Tile::BN, Tile::BK};

// Threads of a pass over columns: as many beside each other as there are columns, up to a warp's.
dim3 pass_block(int64_t columns) {
  unsigned x = 1;
  while (x < 32 && x < columns) x *= 2;
  return dim3(x, pass_threads / x);
}

template <class S> ElementwiseOperand<S> operand_of(const Matrix& x) {
  return {static_cast<const S*>(x.data), x.row_stride, x.column_stride};
}

template <class S, Elementwise what> void launch_elementwise(const Context& context, ElementwiseArguments<S> p) {
  if (p.rows == 0 || p.columns == 0) return;
  p.run = rows_of_run(p.rows);
  const dim3 block = pass_block(p.columns);
  const dim3 grid(unsigned(ceil_div(p.columns, block.x)), unsigned(ceil_div(p.rows, p.run)));
  check(launch(elementwise<S, what>, grid, block, 0, context.stream, p), "elementwise", p.rows, p.columns, 0);
}

}  // namespace

template <class S> Plan Kernels<S>::plan(const Context& context, Epilogue epilogue, int64_t m, int64_t n, int64_t k) {
  using Tiles = SimtTiles<S>;
  constexpr TileShape shapes[] = {shape_of<typename Tiles::Large>, shape_of<typename Tiles::Medium>,
                                  shape_of<typename Tiles::Small>};
  const TileRow row = tile_row(context.architecture);
  // The most that cutting k may multiply the number of blocks by.
  const int64_t cuts = epilogue == Epilogue::wgrad ? std::clamp<int64_t>(k / shortest_part, 1, most_parts) : 1;
  const auto tiles = [&](int tile) { return ceil_div(m, shapes[tile].bm) * ceil_div(n, shapes[tile].bn); };
  Plan plan;
  plan.tile = tiles(large_tile) * cuts >= row.large_from     ? large_tile
              : tiles(medium_tile) * cuts >= row.medium_from ? medium_tile
                                                             : small_tile;
  const TileShape& shape = shapes[plan.tile];
  plan.row_tiles = ceil_div(m, shape.bm);
  plan.column_tiles = ceil_div(n, shape.bn);
  if (plan.row_tiles * plan.column_tiles > most_blocks)
    throw std::runtime_error("fastmlp: a product of M = " + std::to_string(m) + " and N = " + std::to_string(n) +
                             " needs more blocks than a CUDA grid has");
  const int64_t blocks = std::max<int64_t>(1, plan.row_tiles * plan.column_tiles);
  const int64_t wanted = std::clamp<int64_t>(2 * row.multiprocessors / blocks, 1, cuts);
  plan.part = std::max(ceil_div(ceil_div(k, wanted), shape.bk) * shape.bk, shape.bk);
  plan.parts = std::max<int64_t>(1, ceil_div(k, plan.part));
  return plan;
}

template <class S>
void Kernels<S>::multiply(const Context& context, const Plan& plan, Epilogue epilogue, const Product<S>& product) {
  if (product.m == 0 || product.n == 0) return;
  Product<S> p = product;
  p.part = plan.part;
  if (plan.parts == 1) p.partials = nullptr;
  p.vectors = takes_vectors(p);
  switch (epilogue) {
    case Epilogue::forward:
      return launch_product<S, Epilogue::forward>(context, plan, p);
    case Epilogue::dgrad:
      return launch_product<S, Epilogue::dgrad>(context, plan, p);
    case Epilogue::wgrad:
      launch_product<S, Epilogue::wgrad>(context, plan, p);
      if (p.partials) sum_partials(context, p.partials, plan.parts, p.m * p.n, p.output);
  }
}

template <class S>
void Kernels<S>::apply_gradient(const Context& context, int64_t rows, int64_t columns, const Matrix& grad, const Matrix& saved,
                    const ActivationSpec& activation, S* output, C* column_sums) {
  ElementwiseArguments<S> p;
  p.rows = rows;
  p.columns = columns;
  p.grad = operand_of<S>(grad);
  p.saved = operand_of<S>(saved);
  p.activation = activation;
  p.output = output;
  p.column_sums = column_sums;
  launch_elementwise<S, Elementwise::gradient>(context, p);
}

template <class S>
void Kernels<S>::apply_activation(const Context& context, int64_t rows, int64_t columns, const Matrix& saved,
                      const ActivationSpec& activation, S* output) {
  ElementwiseArguments<S> p;
  p.rows = rows;
  p.columns = columns;
  p.saved = operand_of<S>(saved);
  p.activation = activation;
  p.output = output;
  launch_elementwise<S, Elementwise::value>(context, p);
}

template <class S>
void Kernels<S>::sum_partials(const Context& context, const C* partials, int64_t count, int64_t columns, S* output) {
  if (columns == 0) return;
  const dim3 block = count <= 8 ? dim3(pass_threads) : pass_block(columns);
  const dim3 grid(unsigned(ceil_div(columns, block.x)));
  const char* const error = launch(sum_rows<S>, grid, block, 0, context.stream, partials, count, columns, output);
  check(error, "sum_rows", count, columns, 0);
}

}  // namespace fastmlp::cuda

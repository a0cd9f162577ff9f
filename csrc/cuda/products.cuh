// Behind products.h, for one dtype: from a product to the kernel that fits it, and its launch. Included once for each
// dtype by the files of dtypes/, which nvcc compiles, and the host compiler for the emulator.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "fused.cuh"
#include "mma.cuh"
#include "products.h"
#include "rows.cuh"
#include "simt.cuh"

namespace fastmlp::cuda {
namespace {

constexpr int64_t most_blocks = 0x7fffffff;
constexpr int64_t longest_part = 1 << 30;  // of k, which a kernel counts in 32 bits

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check(const char* error, const char* kernel, int64_t m, int64_t n, int64_t k) {
  if (!error) return;
  throw std::runtime_error("fastmlp: CUDA kernel " + std::string(kernel) + " failed for M = " + std::to_string(m) +
                           ", N = " + std::to_string(n) + ", K = " + std::to_string(k) + ": " + error);
}

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Vectors of 16 bytes lie along k for both operands of forward (NT), for the first of dgrad (NN), for none of wgrad
// (TN).
constexpr Read read_of_a(Epilogue epilogue) { return epilogue == Epilogue::wgrad ? Read::along_rows : Read::along_k; }
constexpr Read read_of_b(Epilogue epilogue) { return epilogue == Epilogue::forward ? Read::along_k : Read::along_rows; }

// None may be half outside. Parts of k are multiples of a tile's.
template <class S> bool can_read(Read read, const Operand<S>& x, int64_t size, int64_t k) {
  constexpr int64_t vector = per_16_bytes<S>;
  const bool along_k = read == Read::along_k;
  return (along_k ? x.k_stride : x.stride) == 1 && (along_k ? x.stride : x.k_stride) % vector == 0 &&
         (along_k ? k : size) % vector == 0 && aligned(x.data, 16);
}

// Whether the epilogue can take four elements at a time.
template <class S> bool takes_vectors(const Product<S>& p) {
  constexpr size_t bytes = std::min<size_t>(16, 4 * sizeof(S));
  return p.n % 4 == 0 && aligned(p.output, bytes) && aligned(p.pre_activation, bytes) && aligned(p.partials, 16) &&
         (!p.bias || (p.bias_stride == 1 && aligned(p.bias, bytes))) &&
         (!p.saved || (p.saved_column_stride == 1 && p.saved_stride % 4 == 0 && aligned(p.saved, bytes)));
}

// The two families of product kernels: their tiles by the sizes of tiles.h, and which kernels there are.
template <class S> struct Simt {
  static constexpr const char* name = "simt_product";
  static constexpr bool reads_vectors = sizeof(S) >= sizeof(float);
  // For vectors of float32 only: nothing else has the registers for it.
  static constexpr bool has_large = sizeof(S) == sizeof(float);
  using Large = SimtTile<128, 128, 8, 8, 8>;
  static constexpr int BK = sizeof(S) == sizeof(double) ? 8 : 16;
  using Medium = SimtTile<64, 64, BK, 4, 4>;
  using Small = SimtTile<32, 32, BK, 4, 4>;
  template <class Tile, Read read_a, Read read_b, Epilogue epilogue>
  static constexpr auto kernel = &simt_product<S, Tile, read_a, read_b, epilogue>;
};

template <class S> struct Mma {
  static constexpr const char* name = "mma_product";
  static constexpr bool reads_vectors = true;
  static constexpr bool has_large = true;  // for vectors only
  using Large = MmaTile<128, 128, 32, 64, 64>;
  using Medium = MmaTile<64, 64, 32, 32, 32>;
  using Small = MmaTile<16, 64, 64, 16, 16>;
  template <class Tile, Read read_a, Read read_b, Epilogue epilogue>
  static constexpr auto kernel = &mma_product<S, Tile, read_a, read_b, epilogue>;
};

// bfloat16 has tensor cores from sm_80 on; float16 on all that CUDA 13 knows.
template <class S> constexpr bool has_mma = sizeof(S) == 2;
template <class S> constexpr bool has_simt = !has_mma<S> || std::is_same_v<S, BFloat16>;
template <class S> bool uses_mma(const Context& context) {
  return has_mma<S> && (!has_simt<S> || context.architecture >= 80);
}

// Calls f with the family that the context's architecture computes S by.
template <class S, class F> void with_family(const Context& context, const F& f) {
  if constexpr (has_mma<S>) {
    if (uses_mma<S>(context)) return f(Mma<S>());
  }
  if constexpr (has_simt<S>) f(Simt<S>());
}

template <class Family, class S, class Tile, Epilogue epilogue>
void launch_tile(const Context& context, const Plan& plan, const Product<S>& p) {
  const dim3 grid(unsigned(plan.row_tiles * plan.column_tiles), 1, unsigned(plan.parts));
  constexpr bool vectors_only = std::is_same_v<Tile, typename Family::Large>;
  constexpr bool elements_only = !Family::reads_vectors;
  const char* error = nullptr;
  if constexpr (!elements_only) {
    constexpr auto kernel = Family::template kernel<Tile, read_of_a(epilogue), read_of_b(epilogue), epilogue>;
    if (vectors_only || plan.vectors) error = launch(kernel, grid, dim3(Tile::threads), 0, context.stream, p);
  }
  if constexpr (!vectors_only) {
    constexpr auto kernel = Family::template kernel<Tile, Read::elements, Read::elements, epilogue>;
    if (elements_only || !plan.vectors) error = launch(kernel, grid, dim3(Tile::threads), 0, context.stream, p);
  }
  check(error, Family::name, p.m, p.n, p.k);
}

template <class S, Epilogue epilogue>
void launch_product(const Context& context, const Plan& plan, const Product<S>& p) {
  with_family<S>(context, [&](auto family) {
    using Family = decltype(family);
    if constexpr (Family::has_large) {
      if (plan.tile == large_tile) return launch_tile<Family, S, typename Family::Large, epilogue>(context, plan, p);
    }
    if (plan.tile == medium_tile) return launch_tile<Family, S, typename Family::Medium, epilogue>(context, plan, p);
    launch_tile<Family, S, typename Family::Small, epilogue>(context, plan, p);
  });
}

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

template <class S> std::array<TileShape, tile_sizes> Kernels<S>::tiles(const Context& context) {
  std::array<TileShape, tile_sizes> shapes;
  with_family<S>(context, [&](auto family) {
    using Family = decltype(family);
    const auto shape_of = [](auto tile) { return TileShape{tile.BM, tile.BN, tile.BK}; };
    using Large = std::conditional_t<Family::has_large, typename Family::Large, typename Family::Medium>;
    shapes = {shape_of(Large()), shape_of(typename Family::Medium()), shape_of(typename Family::Small())};
  });
  return shapes;
}

template <class S> Plan Kernels<S>::plan(const Context& context, Epilogue epilogue, const Product<S>& p) {
  Plan plan;
  const std::array<TileShape, tile_sizes> shapes = tiles(context);
  with_family<S>(context, [&](auto family) {
    using Family = decltype(family);
    plan.vectors = Family::reads_vectors && can_read(read_of_a(epilogue), p.a, p.m, p.k) &&
                   can_read(read_of_b(epilogue), p.b, p.n, p.k);
    const TileRow row = tile_row(context.architecture);
    // The most that cutting k may multiply the number of blocks by.
    const int64_t cuts = epilogue == Epilogue::wgrad ? std::clamp<int64_t>(p.k / shortest_part, 1, most_parts) : 1;
    const auto blocks = [&](int tile) { return ceil_div(p.m, shapes[tile].bm) * ceil_div(p.n, shapes[tile].bn); };
    const bool has_large = Family::has_large && plan.vectors;
    if (context.tile) {
      plan.tile = *context.tile == large_tile && !has_large ? medium_tile : *context.tile;
    } else if (has_large && blocks(large_tile) * cuts >= row.large_from) {
      plan.tile = large_tile;
    } else if (blocks(medium_tile) * cuts >= row.medium_from) {
      plan.tile = medium_tile;
    }
    const TileShape& shape = shapes[plan.tile];
    plan.row_tiles = ceil_div(p.m, shape.bm);
    plan.column_tiles = ceil_div(p.n, shape.bn);
    const int64_t tiles = blocks(plan.tile);
    if (tiles > most_blocks)
      throw std::runtime_error("fastmlp: a product of M = " + std::to_string(p.m) + " and N = " + std::to_string(p.n) +
                               " needs more blocks than a CUDA grid has");
    if (epilogue != Epilogue::wgrad && p.k > longest_part)
      throw std::runtime_error("fastmlp: sums of K = " + std::to_string(p.k) +
                               " products are too long for the CUDA kernels");
    const int64_t wanted = std::max(std::clamp<int64_t>(2 * row.multiprocessors / std::max<int64_t>(1, tiles), 1, cuts),
                                    ceil_div(p.k, longest_part));
    plan.part = std::max(ceil_div(ceil_div(p.k, wanted), shape.bk) * shape.bk, shape.bk);
    plan.parts = std::max<int64_t>(1, ceil_div(p.k, plan.part));
  });
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
void Kernels<S>::apply_gradient(const Context& context, int64_t rows, int64_t columns, const Matrix& grad,
                                const Matrix& saved, const ActivationSpec& activation, S* output, C* column_sums) {
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

template <class S> void Kernels<S>::fused_forward(const Context& context, const FusedNetwork<S>& p) {
  if constexpr (std::is_same_v<S, float>) {
    const dim3 grid(unsigned(ceil_div(p.rows, fused_forward_rows)));
    check(launch(cuda::fused_forward<S>, grid, dim3(fused_threads), 0, context.stream, p), "fused_forward", p.rows,
          p.layer[p.layers - 1].out_features, p.layer[0].in_features);
  }
}

template <class S> void Kernels<S>::fused_backward(const Context& context, const FusedNetwork<S>& p, int64_t blocks) {
  if constexpr (std::is_same_v<S, float>) {
    check(launch(cuda::fused_backward<S>, dim3(unsigned(blocks)), dim3(fused_threads), 0, context.stream, p),
          "fused_backward", p.rows, p.layer[p.layers - 1].out_features, p.layer[0].in_features);
  }
}

}  // namespace fastmlp::cuda

// Which kernel a product goes to: its family, its tile, how k is cut, or the library. Everything here is arithmetic on
// the product's shape and the card's numbers; products.cuh, which includes this, launches what is chosen.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "mma.cuh"
#include "products.h"
#include "simt.cuh"

namespace fastmlp::cuda {
namespace {

constexpr int64_t longest_part = 1 << 30;  // of k, which a kernel counts in 32 bits

inline bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Vectors of 16 bytes lie along k for both operands of forward (NT), for the first of dgrad (NN), for none of wgrad
// (TN).
constexpr Read read_of_a(Epilogue epilogue) { return epilogue == Epilogue::wgrad ? Read::along_rows : Read::along_k; }
constexpr Read read_of_b(Epilogue epilogue) { return epilogue == Epilogue::forward ? Read::along_k : Read::along_rows; }

// True if x can be read 16 bytes at a time: unit stride, aligned, and no vector straddles the edge. Parts of k are
// multiples of a tile's, so that none straddles the end of a part either.
template <class S> bool can_read(Read read, const Operand<S>& x, int64_t size, int64_t k) {
  constexpr int64_t vector = per_16_bytes<S>;
  const bool along_k = read == Read::along_k;
  return (along_k ? x.k_stride : x.stride) == 1 && (along_k ? x.stride : x.k_stride) % vector == 0 &&
         (along_k ? k : size) % vector == 0 && aligned(x.data, 16);
}

// The two families of product kernels: their tiles for the sizes of tiles.h, and which of the kernels exist.
template <class S> struct Simt {
  static constexpr const char* name = "simt_product";
  static constexpr CostKind costs = sizeof(S) == sizeof(double) ? CostKind::float64 : CostKind::float32;
  static constexpr bool reads_vectors = sizeof(S) >= sizeof(float);
  // Only for operands that are vectors of float32, because nothing else has the registers for it.
  static constexpr bool has_large = sizeof(S) == sizeof(float);
  using Large = SimtTile<128, 128, 8, 8, 8>;
  static constexpr int BK = sizeof(S) == sizeof(double) ? 8 : 16;
  using Medium = SimtTile<64, 64, BK, 4, 4>;
  using Small = SimtTile<32, 32, BK, 4, 4>;
  template <class Tile, Read read_a, Read read_b, Epilogue epilogue>
  static constexpr auto kernel = &simt_product<S, Tile, read_a, read_b, epilogue>;
};

template <class S, Staging staging = Staging::asynchronous> struct Mma {
  static constexpr const char* name = "mma_product";
  static constexpr CostKind costs = CostKind::tensor_cores;
  static constexpr bool reads_vectors = true;
  static constexpr bool has_large = true;  // only for operands read by vectors
  using Large = MmaTile<128, 128, 32, 64, 64, staging>;
  using Medium = MmaTile<64, 64, 32, 32, 32, staging>;
  using Small = MmaTile<16, 64, 64, 16, 16, staging>;
  template <class Tile, Read read_a, Read read_b, Epilogue epilogue>
  static constexpr auto kernel = &mma_product<S, Tile, read_a, read_b, epilogue>;
};

// Tensor cores have bfloat16 from sm_80 on, and float16 on every architecture of CUDA 13.
template <class S> constexpr bool has_mma = sizeof(S) == 2;
template <class S> constexpr bool has_simt = !has_mma<S> || std::is_same_v<S, BFloat16>;
template <class S> bool uses_mma(const Context& context) {
  return has_mma<S> && (!has_simt<S> || context.architecture >= 80);
}

// Calls f with the family that the context's architecture computes S by.
template <class S, class F> void with_family(const Context& context, const F& f) {
  if constexpr (has_mma<S>) {
    if constexpr (!has_simt<S> && !compiles_by_architecture) {
      if (context.architecture < 80) return f(Mma<S, Staging::registers>());
    }
    if (uses_mma<S>(context)) return f(Mma<S>());
  }
  if constexpr (has_simt<S>) f(Simt<S>());
}

template <class S> constexpr DType dtype_of_storage = DType::float32;
template <> inline constexpr DType dtype_of_storage<double> = DType::float64;
template <> inline constexpr DType dtype_of_storage<BFloat16> = DType::bfloat16;
template <> inline constexpr DType dtype_of_storage<Float16> = DType::float16;

template <class Family> constexpr std::array<TileShape, tile_sizes> tile_shapes() {
  const auto shape_of = [](auto tile) { return TileShape{tile.BM, tile.BN, tile.BK}; };
  using Large = std::conditional_t<Family::has_large, typename Family::Large, typename Family::Medium>;
  return {shape_of(Large()), shape_of(typename Family::Medium()), shape_of(typename Family::Small())};
}

// The choice for one product, among the kernels of one family and the library.
template <class Family, class S> class Planner {
 public:
  Planner(const Context& context, Epilogue epilogue, const Product<S>& product)
      : context(context),
        epilogue(epilogue),
        p(product),
        vectors(Family::reads_vectors && can_read(read_of_a(epilogue), p.a, p.m, p.k) &&
                can_read(read_of_b(epilogue), p.b, p.n, p.k)),
        has_library(context.library && p.m > 0 && p.n > 0 && p.k > 0) {}

  Plan plan() const {
    const TileSize chosen = choose();
    return plan_of(fits(chosen) ? chosen : medium_tile);
  }

 private:
  TileSize choose() const {
    if (context.tile) return *context.tile;
    if (context.tf32 && has_library && std::is_same_v<S, float>) return library_call;
    if (context.measured) {
      const ProductKey key{
          context.architecture, context.multiprocessors, dtype_of_storage<S>, epilogue, vectors, p.m, p.n, p.k};
      if (const auto found = context.measured(key)) return *found;
    }
    return fastest_by_table();
  }

  // Whether there is such a kernel for the product.
  bool fits(TileSize tile) const {
    if (tile == large_tile) return Family::has_large && vectors;
    return tile != library_call || has_library;
  }

  TileSize fastest_by_table() const {
    if (has_library && library_by_default(context, Family::costs, epilogue, p.m, p.n, p.k, sizeof(S)))
      return library_call;
    TileSize found = small_tile;
    for (const TileSize tile : {medium_tile, large_tile, library_call}) {
      const bool counts = tile != library_call || library_has_costs(context.architecture);
      if (counts && fits(tile) && cost(tile) < cost(found)) found = tile;
    }
    return found;
  }

  double cost(TileSize tile) const {
    const Costs& costs = costs_of(Family::costs, epilogue);
    if (tile == library_call) return library_cost(costs.library, context.multiprocessors, p.m, p.n, p.k, sizeof(S));
    const Plan plan = plan_of(tile);
    const int64_t blocks = plan.row_tiles * plan.column_tiles * plan.parts;
    return tile_cost(costs.tile[tile], ceil_divide(blocks, context.multiprocessors), std::min(plan.part, p.k)) *
           (vectors || !Family::reads_vectors ? 1 : cost_of_elements(Family::costs));
  }

  Plan plan_of(TileSize tile) const {
    Plan plan;
    plan.tile = tile;
    plan.vectors = vectors;
    if (tile == library_call) {
      plan.row_tiles = runs_of(p.m);
      return plan;
    }
    const TileShape shape = tile_shapes<Family>()[tile];
    plan.row_tiles = ceil_divide(p.m, shape.bm);
    plan.column_tiles = ceil_divide(p.n, shape.bn);
    const int64_t tiles = plan.row_tiles * plan.column_tiles;
    // The most that cutting k may multiply the number of blocks by.
    const int64_t cuts = epilogue == Epilogue::wgrad ? std::clamp<int64_t>(p.k / shortest_part, 1, most_parts) : 1;
    const int64_t wanted =
        std::max(std::clamp<int64_t>(2 * context.multiprocessors / std::max<int64_t>(1, tiles), 1, cuts),
                 ceil_divide(p.k, longest_part));
    plan.part = std::max(round_up(ceil_divide(p.k, wanted), shape.bk), shape.bk);
    plan.parts = std::max<int64_t>(1, ceil_divide(p.k, plan.part));
    return plan;
  }

  const Context& context;
  const Epilogue epilogue;
  const Product<S>& p;
  const bool vectors, has_library;
};

}  // namespace
}  // namespace fastmlp::cuda

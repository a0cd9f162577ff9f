// Behind products.h, for one dtype: from a product to the kernel that fits it, and its launch. Included once for each
// dtype by the files of dtypes/, which nvcc compiles, and the host compiler for the emulator.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../contract/activation_info.h"
#include "fused.cuh"
#include "fused_mma.cuh"
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
  static constexpr CostKind costs = sizeof(S) == sizeof(double) ? CostKind::float64 : CostKind::float32;
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

template <class S, Staging staging = Staging::asynchronous> struct Mma {
  static constexpr const char* name = "mma_product";
  static constexpr CostKind costs = CostKind::tensor_cores;
  static constexpr bool reads_vectors = true;
  static constexpr bool has_large = true;  // for vectors only
  using Large = MmaTile<128, 128, 32, 64, 64, staging>;
  using Medium = MmaTile<64, 64, 32, 32, 32, staging>;
  using Small = MmaTile<16, 64, 64, 16, 16, staging>;
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

// The library's product, then what an epilogue would have done, in place.
template <class S> void multiply_by_library(const Context& context, Epilogue epilogue, const Product<S>& p) {
  const bool forward = epilogue == Epilogue::forward;
  LibraryProduct product{dtype_of_storage<S>, p.m, p.n, p.k};
  product.a = {const_cast<S*>(p.a.data), p.a.stride, p.a.k_stride};
  product.b = {const_cast<S*>(p.b.data), p.b.k_stride, p.b.stride};
  if (forward) product.bias = {const_cast<S*>(p.bias), p.bias_stride};
  S* const sums = p.pre_activation ? p.pre_activation : p.output;
  product.output = sums;
  context.library(product);
  const Matrix written = gapless(sums, p.n);
  const bool done = !p.pre_activation && p.activation.kind == identity_kind;
  if (forward && p.output && !done) Kernels<S>::apply_activation(context, p.m, p.n, written, p.activation, p.output);
  if (epilogue == Epilogue::dgrad && (p.saved || p.column_sums)) {
    const Matrix saved{const_cast<S*>(p.saved), p.saved_stride, p.saved_column_stride};
    Kernels<S>::apply_gradient(context, p.m, p.n, written, saved, p.activation, p.saved ? p.output : nullptr,
                               p.column_sums);
  }
  if (p.row_sums) {
    const Matrix grad{const_cast<S*>(p.a.data), p.a.k_stride, p.a.stride};
    Kernels<S>::apply_gradient(context, p.k, p.m, grad, Matrix(), ActivationSpec(), nullptr, p.row_partials);
    Kernels<S>::sum_partials(context, p.row_partials, runs_of(p.k), p.m, p.row_sums);
  }
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

// Threads of a pass over columns: as many beside each other as there are columns, up to a warp's if others are of use
// for further rows.
dim3 pass_block(int64_t rows, int64_t columns, unsigned threads) {
  unsigned x = 1;
  while (x < (rows > 1 ? 32 : threads) && x < columns) x *= 2;
  return dim3(x, threads / x);
}

template <class S> ElementwiseOperand<S> operand_of(const Matrix& x) {
  return {static_cast<const S*>(x.data), x.row_stride, x.column_stride};
}

// Rows in one run of memory.
template <class S> bool is_gapless(const ElementwiseOperand<S>& x, int64_t columns) {
  return !x.data || (x.column_stride == 1 && x.row_stride == columns);
}

template <class S> bool can_read_vectors(const ElementwiseOperand<S>& x) {
  return !x.data || (x.column_stride == 1 && x.row_stride % per_16_bytes<S> == 0 && aligned(x.data, 16));
}

template <class S, Elementwise what, int vector>
void launch_elementwise(const Context& context, const ElementwiseArguments<S>& p) {
  const dim3 block = pass_block(p.rows, ceil_div(p.columns, vector), pass_threads);
  const dim3 grid(unsigned(ceil_div(p.columns, int64_t(block.x) * vector)), unsigned(ceil_div(p.rows, p.run)));
  check(launch(elementwise<S, what, vector>, grid, block, 0, context.stream, p), "elementwise", p.rows, p.columns, 0);
}

template <class S, Elementwise what> void launch_elementwise(const Context& context, ElementwiseArguments<S> p) {
  if (p.rows == 0 || p.columns == 0) return;
  // As one long row, where nothing is summed and the result does not show the difference.
  if (!p.column_sums && is_gapless(p.grad, p.columns) && is_gapless(p.saved, p.columns)) {
    p.columns *= p.rows;
    p.rows = 1;
  }
  p.run = rows_of_run(p.rows);
  constexpr int vector = per_16_bytes<S>;
  const bool vectors =
      p.columns % vector == 0 && aligned(p.output, 16) && can_read_vectors(p.grad) && can_read_vectors(p.saved);
  vectors ? launch_elementwise<S, what, vector>(context, p) : launch_elementwise<S, what, 1>(context, p);
}

template <class S> void check_fused(const char* error, const char* kernel, const FusedNetwork<S>& p) {
  check(error, kernel, p.rows, p.layer[p.layers - 1].out_features, p.layer[0].in_features);
}

// How a fused kernel runs on tensor cores.
struct FusedPlan {
  unsigned threads = 0;
  size_t shared_bytes = 0;
  int64_t blocks = 0;
};

// Registers for the largest of the gradients of weights.
template <class S> void hold_largest(FusedNetwork<S>& p, int count) {
  for (int h = 0; h < count; h++) {
    int64_t most = 0;
    int largest = -1;
    for (int l = p.lowest; l < p.layers; l++) {
      const FusedLayer<S>& layer = p.layer[l];
      const int64_t weights = int64_t(layer.out_features) * layer.in_features;
      if (!layer.weight_sums || layer.held >= 0 || weights <= most) continue;
      most = weights;
      largest = l;
    }
    if (largest >= 0) p.layer[largest].held = h;
  }
}

// Gives the layers' weights their places, too. Weights stay in shared memory if all fit beside the rows; else two
// layers' do, the next one's ahead, where that costs no block at once, or the batch has no more tiles than the card has
// multiprocessors; else one's.
template <class S, int W, class Kinds, bool backward> FusedPlan plan_fused(const Context& context, FusedNetwork<S>& p) {
  using Shape = MmaFused<W>;
  constexpr int64_t warp_rows = 16 * (backward ? Shape::backward_fragments : Shape::forward_fragments);
  constexpr int64_t warp_elements = warp_rows * W * (backward ? 1 + Shape::stages : 1);
  constexpr int64_t most_warps = (backward ? Shape::backward_threads : Shape::forward_threads) / 32;
  constexpr int64_t by_registers = backward ? Shape::backward_blocks : Shape::forward_blocks;
  const int64_t limit = std::min(context.block_shared_bytes, most_block_shared);
  int64_t all = 0, largest = 0;
  for (int l = 0; l < p.layers; l++) {
    // A line for each output, and behind them biases in float32.
    const int64_t elements = padded(p.layer[l].out_features) * (W + (backward ? 0 : 2));
    p.layer[l].place = int(all);
    all += elements;
    largest = std::max(largest, elements);
  }
  int64_t warps = most_warps;
  const auto bytes = [&](int64_t weights) { return int64_t(sizeof(S)) * (weights + warps * warp_elements); };
  const auto blocks_at_once = [&](int64_t weights) { return resident_blocks(context, bytes(weights), by_registers); };
  if (bytes(all) > limit) {
    const bool few = ceil_div(p.rows, warps * warp_rows) <= context.multiprocessors;
    const bool two = bytes(2 * largest) <= limit && (few || blocks_at_once(2 * largest) == blocks_at_once(largest));
    p.slots = two ? 2 : 1;
  }
  p.weight_elements = int(p.slots == 0 ? all : p.slots * largest);
  while (bytes(p.weight_elements) > limit) warps--;
  if constexpr (backward) {
    if (warps == most_warps) hold_largest(p, held_parts<W, Kinds>);
  }
  // As few blocks as give each the same number of tiles.
  const int64_t tiles = ceil_div(p.rows, warps * warp_rows);
  FusedPlan plan;
  plan.threads = unsigned(warps * 32);
  plan.shared_bytes = size_t(bytes(p.weight_elements));
  plan.blocks = ceil_div(tiles, ceil_div(tiles, context.multiprocessors * blocks_at_once(p.weight_elements)));
  return plan;
}

template <class S> int widest_layer(const FusedNetwork<S>& p) {
  int widest = p.layer[0].in_features;
  for (int l = 0; l < p.layers; l++) widest = std::max(widest, p.layer[l].out_features);
  return widest;
}

// Calls f with the width of the float32 kernels that take the network.
template <class S, class F> void with_fused_width(const FusedNetwork<S>& p, const F& f) {
  const int widest = widest_layer(p);
  if (widest <= 32) return f(std::integral_constant<int, 32>());
  if (widest <= 64) return f(std::integral_constant<int, 64>());
  f(std::integral_constant<int, 128>());
}

// Calls f with the width of the kernels on tensor cores that take the network, and their list of activations.
template <class S, class F> void with_mma_fused(const FusedNetwork<S>& p, const F& f) {
  bool light = true;
  for (int l = 0; l < p.layers; l++) light = light && p.layer[l].activation.kind < LightActivations::size;
  const auto with_kinds = [&](auto width) {
    if (light) return f(width, LightActivations());
    f(width, Activations());
  };
  if (widest_layer(p) <= 64) return with_kinds(std::integral_constant<int, 64>());
  with_kinds(std::integral_constant<int, 128>());
}

}  // namespace

template <class S> const char* Kernels<S>::obstacle() { return missing_code(sum_rows<S>); }

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
  Plan best;
  const std::array<TileShape, tile_sizes> shapes = tiles(context);
  with_family<S>(context, [&](auto family) {
    using Family = decltype(family);
    const bool vectors = Family::reads_vectors && can_read(read_of_a(epilogue), p.a, p.m, p.k) &&
                         can_read(read_of_b(epilogue), p.b, p.n, p.k);
    const bool has_large = Family::has_large && vectors;
    const bool has_library = context.library && p.m > 0 && p.n > 0 && p.k > 0;
    const auto plan_of = [&](TileSize tile) {
      Plan plan;
      plan.tile = tile;
      plan.vectors = vectors;
      if (tile == library_call) {
        plan.row_tiles = runs_of(p.m);
        return plan;
      }
      const TileShape& shape = shapes[tile];
      plan.row_tiles = ceil_div(p.m, shape.bm);
      plan.column_tiles = ceil_div(p.n, shape.bn);
      const int64_t tiles = plan.row_tiles * plan.column_tiles;
      // The most that cutting k may multiply the number of blocks by.
      const int64_t cuts = epilogue == Epilogue::wgrad ? std::clamp<int64_t>(p.k / shortest_part, 1, most_parts) : 1;
      const int64_t wanted =
          std::max(std::clamp<int64_t>(2 * context.multiprocessors / std::max<int64_t>(1, tiles), 1, cuts),
                   ceil_div(p.k, longest_part));
      plan.part = std::max(ceil_div(ceil_div(p.k, wanted), shape.bk) * shape.bk, shape.bk);
      plan.parts = std::max<int64_t>(1, ceil_div(p.k, plan.part));
      return plan;
    };
    const auto fits = [&](TileSize tile) {
      return tile == large_tile ? has_large : tile == library_call ? has_library : true;
    };
    const auto fastest_by_table = [&] {
      if (has_library && library_by_default(context, Family::costs, epilogue, p.m, p.n, p.k, sizeof(S)))
        return library_call;
      const Costs& costs = costs_of(Family::costs, epilogue);
      const auto cost = [&](TileSize tile) {
        if (tile == library_call) return library_cost(costs.library, context.multiprocessors, p.m, p.n, p.k, sizeof(S));
        const Plan plan = plan_of(tile);
        const int64_t blocks = plan.row_tiles * plan.column_tiles * plan.parts;
        return tile_cost(costs.tile[tile], ceil_div(blocks, context.multiprocessors), std::min(plan.part, p.k)) *
               (vectors || !Family::reads_vectors ? 1 : cost_of_elements(Family::costs));
      };
      TileSize found = small_tile;
      for (const TileSize tile : {medium_tile, large_tile, library_call}) {
        const bool counts = tile != library_call || library_has_costs(context.architecture);
        if (counts && fits(tile) && cost(tile) < cost(found)) found = tile;
      }
      return found;
    };
    const auto choose = [&]() -> TileSize {
      if (context.tile) return *context.tile;
      if (context.tf32 && has_library && std::is_same_v<S, float>) return library_call;
      if (context.measured) {
        const ProductKey key{
            context.architecture, context.multiprocessors, dtype_of_storage<S>, epilogue, vectors, p.m, p.n, p.k};
        if (const auto found = context.measured(key)) return *found;
      }
      return fastest_by_table();
    };
    const TileSize chosen = choose();
    best = plan_of(fits(chosen) ? chosen : medium_tile);
    if (best.tile == library_call) return;
    if (best.row_tiles * best.column_tiles > most_blocks)
      throw std::runtime_error("fastmlp: a product of M = " + std::to_string(p.m) + " and N = " + std::to_string(p.n) +
                               " needs more blocks than a CUDA grid has");
    if (epilogue != Epilogue::wgrad && p.k > longest_part)
      throw std::runtime_error("fastmlp: sums of K = " + std::to_string(p.k) +
                               " products are too long for the CUDA kernels");
  });
  return best;
}

template <class S>
void Kernels<S>::multiply(const Context& context, const Plan& plan, Epilogue epilogue, const Product<S>& product) {
  if (product.m == 0 || product.n == 0) return;
  if (plan.tile == library_call) return multiply_by_library(context, epilogue, product);
  Product<S> p = product;
  p.part = plan.part;
  if (plan.parts == 1) p.partials = p.row_partials = nullptr;
  p.vectors = takes_vectors(p);
  switch (epilogue) {
    case Epilogue::forward:
      return launch_product<S, Epilogue::forward>(context, plan, p);
    case Epilogue::dgrad:
      return launch_product<S, Epilogue::dgrad>(context, plan, p);
    case Epilogue::wgrad:
      launch_product<S, Epilogue::wgrad>(context, plan, p);
      if (p.partials) sum_partials(context, p.partials, plan.parts, p.m * p.n, p.output);
      if (p.row_partials) sum_partials(context, p.row_partials, plan.parts, p.m, p.row_sums);
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
  const dim3 block = pass_block(count > 8 ? count : 1, columns, count > 64 ? sum_threads : pass_threads);
  const dim3 grid(unsigned(ceil_div(columns, block.x)));
  const char* const error = launch(sum_rows<S>, grid, block, 0, context.stream, partials, count, columns, output);
  check(error, "sum_rows", count, columns, 0);
}

template <class S> void Kernels<S>::fused_forward(const Context& context, const FusedNetwork<S>& p) {
  if constexpr (std::is_same_v<S, float>) {
    with_fused_width(p, [&](auto width) {
      const auto launch_rows = [&](auto tile_rows) {
        const dim3 grid(unsigned(ceil_div(p.rows, FusedTile<width, tile_rows>::BM)));
        check_fused(launch(cuda::fused_forward<S, width, tile_rows>, grid, dim3(fused_threads), 0, context.stream, p),
                    "fused_forward", p);
      };
      // Fewer rows of a block where else multiprocessors had none.
      const bool few = p.rows < context.multiprocessors * FusedTile<width, 8>::BM;
      if (few) return launch_rows(std::integral_constant<int, 4>());
      launch_rows(std::integral_constant<int, 8>());
    });
  } else if constexpr (has_mma<S>) {
    with_mma_fused(p, [&](auto width, auto kinds) {
      FusedNetwork<S> planned = p;
      const FusedPlan plan = plan_fused<S, width, decltype(kinds), false>(context, planned);
      check_fused(launch(mma_fused_forward<S, width, decltype(kinds)>, dim3(unsigned(plan.blocks)), dim3(plan.threads),
                         plan.shared_bytes, context.stream, planned),
                  "mma_fused_forward", p);
    });
  }
}

template <class S> int64_t Kernels<S>::fused_blocks(const Context& context, const FusedNetwork<S>& p) {
  int64_t blocks = 1;
  if constexpr (std::is_same_v<S, float>) {
    with_fused_width(p, [&](auto width) {
      const int64_t runs = ceil_div(p.rows, FusedTile<width, 4>::BM);
      const int64_t at_once = context.multiprocessors *
                              resident_blocks(context, fused_backward_shared<C, width>, fused_backward_blocks<width>);
      // As few as give each the same number of runs.
      blocks = ceil_div(runs, ceil_div(runs, at_once));
    });
  } else if constexpr (has_mma<S>) {
    with_mma_fused(p, [&](auto width, auto kinds) {
      FusedNetwork<S> planned = p;
      blocks = plan_fused<S, width, decltype(kinds), true>(context, planned).blocks;
    });
  }
  return blocks;
}

template <class S> void Kernels<S>::fused_backward(const Context& context, const FusedNetwork<S>& p, int64_t blocks) {
  if constexpr (std::is_same_v<S, float>) {
    with_fused_width(p, [&](auto width) {
      check_fused(
          launch(cuda::fused_backward<S, width>, dim3(unsigned(blocks)), dim3(fused_threads), 0, context.stream, p),
          "fused_backward", p);
    });
  } else if constexpr (has_mma<S>) {
    with_mma_fused(p, [&](auto width, auto kinds) {
      FusedNetwork<S> planned = p;
      const FusedPlan plan = plan_fused<S, width, decltype(kinds), true>(context, planned);
      check_fused(launch(mma_fused_backward<S, width, decltype(kinds)>, dim3(unsigned(blocks)), dim3(plan.threads),
                         plan.shared_bytes, context.stream, planned),
                  "mma_fused_backward", p);
    });
  }
}

template <class S> void Kernels<S>::sum_fused(const Context& context, const FusedSums<S>& sums) {
  if constexpr (std::is_same_v<S, float> || has_mma<S>) {
    const dim3 block = pass_block(sums.count, sums.stride, pass_threads);
    const dim3 grid(unsigned(ceil_div(sums.stride, block.x)));
    check(launch(cuda::sum_fused<S>, grid, block, 0, context.stream, sums), "sum_fused", sums.count, sums.stride, 0);
  }
}

}  // namespace fastmlp::cuda

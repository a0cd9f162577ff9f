// Defines the functions of products.h for one dtype: they launch the kernels that product_plan.cuh and fused_plan.cuh
// choose, and check each launch. Included once for each dtype by the files of dtypes/, which nvcc compiles, and the
// host compiler for the emulator. No kernel is defined here.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../contract/activation_info.h"
#include "fused_mma_backward.cuh"
#include "fused_mma_forward.cuh"
#include "fused_plan.cuh"
#include "product_plan.cuh"
#include "products.h"
#include "rows.cuh"

namespace fastmlp::cuda {
namespace {

constexpr int64_t most_blocks = 0x7fffffff;

void check(const char* error, const char* kernel, int64_t m, int64_t n, int64_t k) {
  if (!error) return;
  throw std::runtime_error("fastmlp: CUDA kernel " + std::string(kernel) + " failed for M = " + std::to_string(m) +
                           ", N = " + std::to_string(n) + ", K = " + std::to_string(k) + ": " + error);
}

// Whether the epilogue can take four elements at a time.
template <class S> bool takes_vectors(const Product<S>& p) {
  constexpr size_t bytes = std::min<size_t>(16, 4 * sizeof(S));
  return p.n % 4 == 0 && aligned(p.output, bytes) && aligned(p.pre_activation, bytes) && aligned(p.partials, 16) &&
         (!p.bias || (p.bias_stride == 1 && aligned(p.bias, bytes))) && (!p.saved.data || has_vectors<4>(p.saved));
}

// Calls the library's product, then passes over its output in place that do what an epilogue would have done.
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
  if (epilogue == Epilogue::dgrad && (p.saved.data || p.column_sums)) {
    const Matrix saved{const_cast<S*>(p.saved.data), p.saved.row_stride, p.saved.column_stride};
    Kernels<S>::apply_gradient(context, p.m, p.n, written, saved, p.activation, saved.data ? p.output : nullptr,
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

// The threads of a pass over columns: as many beside each other as there are columns, but no more than a warp's if
// there are further rows for the others.
dim3 pass_block(int64_t rows, int64_t columns, unsigned threads) {
  unsigned x = 1;
  while (x < (rows > 1 ? 32 : threads) && x < columns) x *= 2;
  return dim3(x, threads / x);
}

// Whether all rows are one run of memory.
template <class S> bool is_gapless(const StridedMatrix<S>& x, int64_t columns) {
  return !x.data || (x.column_stride == 1 && x.row_stride == columns);
}

template <class S> bool can_read_vectors(const StridedMatrix<S>& x) {
  return !x.data || has_vectors<per_16_bytes<S>>(x);
}

template <class S, Elementwise what, int vector>
void launch_elementwise(const Context& context, const ElementwiseArguments<S>& p) {
  const dim3 block = pass_block(p.rows, ceil_divide(p.columns, vector), pass_threads);
  const dim3 grid(unsigned(ceil_divide(p.columns, int64_t(block.x) * vector)), unsigned(ceil_divide(p.rows, p.run)));
  check(launch(elementwise<S, what, vector>, grid, block, 0, context.stream, p), "elementwise", p.rows, p.columns, 0);
}

template <class S, Elementwise what> void launch_elementwise(const Context& context, ElementwiseArguments<S> p) {
  if (p.rows == 0 || p.columns == 0) return;
  // A matrix of which nothing is summed goes as one long row if it is one run of memory; the results are the same.
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

}  // namespace

template <class S> const char* Kernels<S>::obstacle() { return missing_code(sum_rows<S>); }

template <class S> std::array<TileShape, tile_sizes> Kernels<S>::tiles(const Context& context) {
  std::array<TileShape, tile_sizes> shapes;
  with_family<S>(context, [&](auto family) { shapes = tile_shapes<decltype(family)>(); });
  return shapes;
}

template <class S> Plan Kernels<S>::plan(const Context& context, Epilogue epilogue, const Product<S>& p) {
  Plan plan;
  with_family<S>(context, [&](auto family) { plan = Planner<decltype(family), S>(context, epilogue, p).plan(); });
  if (plan.tile == library_call) return plan;
  if (plan.row_tiles * plan.column_tiles > most_blocks)
    throw std::runtime_error("fastmlp: a product of M = " + std::to_string(p.m) + " and N = " + std::to_string(p.n) +
                             " needs more blocks than a CUDA grid has");
  if (epilogue != Epilogue::wgrad && p.k > longest_part)
    throw std::runtime_error("fastmlp: sums of K = " + std::to_string(p.k) +
                             " products are too long for the CUDA kernels");
  return plan;
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
  p.grad = strided<S>(grad);
  p.saved = strided<S>(saved);
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
  p.saved = strided<S>(saved);
  p.activation = activation;
  p.output = output;
  launch_elementwise<S, Elementwise::value>(context, p);
}

template <class S>
void Kernels<S>::sum_partials(const Context& context, const C* partials, int64_t count, int64_t columns, S* output) {
  if (columns == 0) return;
  const dim3 block = pass_block(count > 8 ? count : 1, columns, count > 64 ? sum_threads : pass_threads);
  const dim3 grid(unsigned(ceil_divide(columns, block.x)));
  const char* const error = launch(sum_rows<S>, grid, block, 0, context.stream, partials, count, columns, output);
  check(error, "sum_rows", count, columns, 0);
}

template <class S> void Kernels<S>::fused_forward(const Context& context, const FusedNetwork<S>& p) {
  if constexpr (std::is_same_v<S, float>) {
    with_fused_width(p, [&](auto width) {
      const auto launch_rows = [&](auto tile_rows) {
        const dim3 grid(unsigned(ceil_divide(p.rows, FusedTile<width, tile_rows>::BM)));
        check_fused(launch(cuda::fused_forward<S, width, tile_rows>, grid, dim3(fused_threads), 0, context.stream, p),
                    "fused_forward", p);
      };
      // Blocks take fewer rows if multiprocessors would else have none.
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
      const int64_t runs = ceil_divide(p.rows, FusedTile<width, 4>::BM);
      const int64_t at_once = context.multiprocessors *
                              resident_blocks(context, fused_backward_shared<C, width>, fused_backward_blocks<width>);
      // As few blocks as give each the same number of runs.
      blocks = ceil_divide(runs, ceil_divide(runs, at_once));
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
    const dim3 grid(unsigned(ceil_divide(sums.stride, block.x)));
    check(launch(cuda::sum_fused<S>, grid, block, 0, context.stream, sums), "sum_fused", sums.count, sums.stride, 0);
  }
}

}  // namespace fastmlp::cuda

// The kernels that network.cu and narrow.cu launch, behind one function each for a dtype, which chooses the tile and
// checks the launch. Defined in products.cuh, which the files of dtypes/ compile. Knows no tensors and allocates
// nothing.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <functional>
#include <optional>
#include <tuple>

#include "fused.h"
#include "product.h"
#include "tiles.h"

namespace fastmlp::cuda {

// A product for the library that PyTorch calls: output = a b, with bias added to each row if it is not null. It has no
// activation, because what the library's ReLU makes of NaN is not documented.
struct LibraryProduct {
  DType dtype = DType::float32;
  int64_t m = 0, n = 0, k = 0;
  Matrix a, b;             // [m, k], [k, n]
  Vector bias;             // [n]
  void* output = nullptr;  // [m, n] without gaps
};

// What the choice of a tile depends on.
struct ProductKey {
  int architecture = 0;
  int64_t multiprocessors = 0;
  DType dtype = DType::float32;
  Epilogue epilogue = Epilogue::forward;
  bool vectors = false;  // operands can be read 16 bytes at a time
  int64_t m = 0, n = 0, k = 0;

  bool operator<(const ProductKey& other) const { return tied() < other.tied(); }

 private:
  std::tuple<int, int64_t, DType, Epilogue, bool, int64_t, int64_t, int64_t> tied() const {
    return {architecture, multiprocessors, dtype, epilogue, vectors, m, n, k};
  }
};

// What a pass runs with, and the card that it runs on. `allocate` is called at most once a pass, before anything is
// launched.
struct Context : Card {
  void* stream = nullptr;
  std::optional<TileSize> tile;                 // in place of the table's choice, where there is such a kernel
  std::optional<bool> fuses;                    // whether narrow networks go through one kernel, in place of tiles.h
  bool tf32 = false;                            // PyTorch may round operands of float32 products to TF32
  std::function<void*(size_t bytes)> allocate;  // aligned to 256
  // Computes a product by PyTorch's library; null if there is none.
  std::function<void(const LibraryProduct&)> library;
  // Returns what was measured, in place of the table's choice; null if nothing was.
  std::function<std::optional<TileSize>(const ProductKey&)> measured;
};

// How a product runs (product_plan.cuh).
struct Plan {
  TileSize tile = small_tile;
  int64_t row_tiles = 0, column_tiles = 0;
  int64_t parts = 1, part = 0;  // for wgrad, k is cut into `parts` parts of `part` terms each
  bool vectors = false;         // operands can be read 16 bytes at a time
};

// How many rows one sum of apply_gradient covers, and how many such runs there are.
inline int64_t rows_of_run(int64_t rows) { return std::max<int64_t>(64, ceil_divide(rows, 1024)); }
inline int64_t runs_of(int64_t rows) { return ceil_divide(rows, rows_of_run(rows)); }

struct TileShape {
  int64_t bm, bn, bk;
};

// Each throws std::runtime_error, with kernel and shape, if a launch fails.
template <class S> struct Kernels {
  using C = Compute<S>;

  // Null, or why the current device cannot run these kernels.
  static const char* obstacle();

  // The tiles behind the sizes of tiles.h. Where there is no large tile, the medium one stands in its place.
  static std::array<TileShape, tile_sizes> tiles(const Context& context);

  // Chooses by the product's shape and operands alone, not by where its results go.
  static Plan plan(const Context& context, Epilogue epilogue, const Product<S>& product);

  // `plan` is that of the product. The product needs room for [parts, m, n] partials if there are several parts, for
  // [parts, m] row_partials if sums of rows are asked for too, and for [row_tiles, n] column_sums if these are asked
  // for.
  static void multiply(const Context& context, const Plan& plan, Epilogue epilogue, const Product<S>& product);

  // output = grad * act'(saved) if output is not null, and the sums of each run of rows, [runs_of(rows), columns], if
  // column_sums is not. The identity needs no saved.
  static void apply_gradient(const Context& context, int64_t rows, int64_t columns, const Matrix& grad,
                             const Matrix& saved, const ActivationSpec& activation, S* output, C* column_sums);

  // output = act(saved), without gaps.
  static void apply_activation(const Context& context, int64_t rows, int64_t columns, const Matrix& saved,
                               const ActivationSpec& activation, S* output);

  // output[i] = the sum of partials[., i] over `count` rows, in an order that depends on the shape alone.
  static void sum_partials(const Context& context, const C* partials, int64_t count, int64_t columns, S* output);

  // Narrow networks, for which narrow.cu says whether there are kernels. Backward leaves the sums of `blocks` blocks,
  // which sum_fused adds up; fused_blocks says how many blocks the card takes.
  static void fused_forward(const Context& context, const FusedNetwork<S>& network);
  static int64_t fused_blocks(const Context& context, const FusedNetwork<S>& network);
  static void fused_backward(const Context& context, const FusedNetwork<S>& network, int64_t blocks);
  static void sum_fused(const Context& context, const FusedSums<S>& sums);
};

}  // namespace fastmlp::cuda

// The kernels that network.cu launches, behind one function each for a dtype: which tile, checked launches. Defined in
// products.cuh, which the files of dtypes/ compile.
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

// A product for the library that PyTorch calls: output = a b, with bias added to each row if it is not null. Without an
// activation: what its ReLU makes of NaN is not written anywhere.
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

// [rows, columns] row by row.
inline Matrix gapless(void* data, int64_t columns) { return {data, columns, 1}; }

// What a pass runs with, and the card that it runs on. `allocate` is called at most once a pass, before anything is
// launched.
struct Context : Card {
  void* stream = nullptr;
  std::optional<TileSize> tile;                 // in place of the table's choice, where there is such a kernel
  std::optional<bool> fuses;                    // narrow networks go through one kernel; not given: by tiles.h
  bool tf32 = false;                            // PyTorch may round operands of float32 products to TF32
  std::function<void*(size_t bytes)> allocate;  // aligned to 256
  // Null if there is none.
  std::function<void(const LibraryProduct&)> library;
  // What was measured, in place of the table's choice; null if nothing was.
  std::function<std::optional<TileSize>(const ProductKey&)> measured;
};

// A product of the static table (tiles.h).
struct Plan {
  TileSize tile = small_tile;
  int64_t row_tiles = 0, column_tiles = 0;
  int64_t parts = 1, part = 0;  // k is cut into so many pieces of so many, for wgrad
  bool vectors = false;         // operands can be read 16 bytes at a time
};

// How many rows one sum of apply_gradient covers, and how many such runs there are.
inline int64_t rows_of_run(int64_t rows) { return std::max<int64_t>(64, (rows + 1023) / 1024); }
inline int64_t runs_of(int64_t rows) { return (rows + rows_of_run(rows) - 1) / rows_of_run(rows); }

struct TileShape {
  int64_t bm, bn, bk;
};

// Each throws std::runtime_error, with kernel and shape, if a launch fails.
template <class S> struct Kernels {
  using C = Compute<S>;

  // Null, or why the current device cannot run these kernels.
  static const char* obstacle();

  // What stands behind the sizes of tiles.h; where there is no large tile, its place holds the medium one.
  static std::array<TileShape, tile_sizes> tiles(const Context& context);

  // By the product's shape and operands alone.
  static Plan plan(const Context& context, Epilogue epilogue, const Product<S>& product);

  // `plan` is that of the product. Room is needed for [parts, m, n] partials if there are several parts, and for
  // [parts, m] of rows if their sums are asked for too; for [row_tiles, n] column sums if these are asked for.
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

  // Narrow networks; not for float64, nor for bfloat16 where tensor cores do not know it. The sums of backward are
  // those of `blocks` blocks; fused_blocks says how many the card takes.
  static void fused_forward(const Context& context, const FusedNetwork<S>& network);
  static int64_t fused_blocks(const Context& context, const FusedNetwork<S>& network);
  static void fused_backward(const Context& context, const FusedNetwork<S>& network, int64_t blocks);
  static void sum_fused(const Context& context, const FusedSums<S>& sums);
};

}  // namespace fastmlp::cuda

// The blocks of rows that narrow layers are computed in: how many rows one has, what it costs, and how its rows are
// copied where they cannot be read as they lie. Used by row_forward.h and row_backward.h.
#pragma once

#include <algorithm>

#include "../contract/problem.h"
#include "parallel.h"
#include "row_blocks.h"

namespace fastmlp::cpu {

// What a block of rows may take in each of its layers, which keeps it in an L1 cache; but not too few rows, which would
// leave registers empty.
constexpr int64_t block_bytes = 32 << 10;
constexpr int64_t fewest_rows = 56, most_rows = 192;

// The most features that a row has before, between or after the layers.
inline int64_t widest(const Network& network, const Layers& layers) {
  int64_t width = network.layers[layers.first].in_features;
  for (size_t l = layers.first; l < layers.end; l++) width = std::max(width, network.layers[l].out_features);
  return width;
}

// What a pass over the layers costs, for useful_threads.
inline double multiply_adds(const Network& network, const Layers& layers, int64_t rows) {
  double weights = 0;
  for (size_t l = layers.first; l < layers.end; l++) {
    const Layer& layer = network.layers[l];
    // Reading and writing a row take time too, hence the 16.
    weights += double(layer.in_features) * double(layer.out_features + 16);
  }
  return weights * double(rows);
}

// How many rows go through the layers together.
template <class S> int64_t block_rows(const Network& network, const Layers& layers, int64_t rows) {
  const int64_t width = std::max<int64_t>(1, widest(network, layers));
  const int64_t most = std::clamp(block_bytes / (width * int64_t(sizeof(S))), fewest_rows, most_rows);
  return std::clamp<int64_t>(rows, 1, most);
}

// Whether a matrix must be copied for the row kernels, which read rows without gaps between their elements. Rows that
// lie a multiple of 4096 bytes apart are copied too, because they share the same few lines of an L1 cache.
template <class S> bool must_be_copied(const Matrix& x) {
  return x.column_stride != 1 || (x.row_stride != 0 && x.row_stride * int64_t(sizeof(S)) % 4096 == 0);
}

inline bool is_gapless(const Matrix& x, int64_t rows, int64_t columns) {
  return (columns <= 1 || x.column_stride == 1) && (rows <= 1 || x.row_stride == columns);
}

// What dropout after a layer makes of a range of its rows, of which x and out hold no others; out may be x.
template <class S> void drop(const Kernels<S>& kernels, const Layer& layer, Range rows, const S* x, S* out) {
  const int64_t columns = layer.out_features;
  kernels.drop(rows.size() * columns, x, layer.dropout.kept + rows.begin * columns, layer.dropout.scale, out);
}

// Copies a block of rows to `buffer`, without gaps.
template <class S> Matrix copied(const Matrix& x, Range rows, int64_t columns, S* buffer) {
  S* out = buffer;
  for (int64_t i = rows.begin; i < rows.end; i++) {
    const S* row = static_cast<const S*>(x.data) + i * x.row_stride;
    for (int64_t j = 0; j < columns; j++) *out++ = row[j * x.column_stride];
  }
  return {buffer, columns, 1};
}

}  // namespace fastmlp::cpu

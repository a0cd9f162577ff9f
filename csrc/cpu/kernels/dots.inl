// Inner products along k of rows that lie gapless in memory, for products with few rows or few columns. Included by
// kernels.inl inside an ISA's namespace and target region, after storage.inl; must not include anything. Called through
// the table by dots.h.

template <class S> struct Dots {
  using C = Compute<S>;
  using M = Arithmetic<S>;
  using V = typename M::V;
  using F = Factors<S>;
  static constexpr int lanes = M::lanes;

  // rows x columns of them, in vectors.
  template <int rows, int columns>
  static void dot(int64_t k, const S* a, int64_t a_stride, const S* b, int64_t b_stride, C* tile, int64_t tile_step,
                  bool add) {
    constexpr int count = rows * columns;
    V sum[(count + lanes - 1) / lanes][lanes] = {};
    for (int64_t p = 0; p < k; p += lanes * F::k_unit) {
      V x[rows];
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) x[i] = F::load_along_k(a + i * a_stride + p, k - p);
#pragma GCC unroll 4
      for (int j = 0; j < columns; j++) {
        const V y = F::load_along_k(b + j * b_stride + p, k - p);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
          V& to = sum[(i * columns + j) / lanes][(i * columns + j) % lanes];
          to = F::multiply_add(to, x[i], y);
        }
      }
    }
    C sums[sizeof sum / sizeof(V)];
    // Unrolled, because sums would otherwise be kept in memory to be indexed.
#pragma GCC unroll 8
    for (int g = 0; g * lanes < count; g++) M::store(sums + g * lanes, M::sums(sum[g]));
    for (int i = 0; i < rows; i++) {
      for (int j = 0; j < columns; j++) {
        C& to = tile[i * tile_step + j];
        to = add ? to + sums[i * columns + j] : sums[i * columns + j];
      }
    }
  }

  // Inner products of some columns with all rows, so many rows together, and fewer at the end.
  template <int together, int columns>
  static void dot_rows(int64_t rows, int64_t k, const S* a, int64_t a_stride, const S* b, int64_t b_stride, C* tile,
                       int64_t tile_step, bool add) {
    for (; rows >= together; rows -= together, a += together * a_stride, tile += together * tile_step) {
      dot<together, columns>(k, a, a_stride, b, b_stride, tile, tile_step, add);
    }
    if constexpr (together > 1) {
      if (rows > 0) dot_rows<together / 2, columns>(rows, k, a, a_stride, b, b_stride, tile, tile_step, add);
    }
  }

  // The lanes of as many products as a vector has lanes are added up at once, so few columns take more rows together.
  static void dot_tile(int64_t rows, int64_t columns, int64_t k, const S* a, int64_t a_stride, const S* b,
                       int64_t b_stride, C* tile, int64_t tile_step, bool add) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      dot_rows<4, 4>(rows, k, a, a_stride, b + j * b_stride, b_stride, tile + j, tile_step, add);
    }
    if (j + 2 <= columns) {
      dot_rows<lanes / 2, 2>(rows, k, a, a_stride, b + j * b_stride, b_stride, tile + j, tile_step, add);
      j += 2;
    }
    if (j < columns) dot_rows<lanes, 1>(rows, k, a, a_stride, b + j * b_stride, b_stride, tile + j, tile_step, add);
  }
};

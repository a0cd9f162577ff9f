// The one body of every ISA's kernels. Each file of isa/ includes it inside its own namespace and
// target region, after Isa (the vectors) and Blocks (the tile sizes); the functions reach
// the rest of the library through make_table() only. Must not include anything, use OpenMP, lambdas
// or standard templates, nor allocate.

#include "math.inl"

template <class T> struct Leaf {
  using M = Math<T>;
  using V = typename M::V;
  using Size = Blocks<T>;
  static constexpr int lanes = M::lanes;
  static constexpr int mr = Size::mr;
  static constexpr int vectors = 2;  // per row of the register tile
  static constexpr int nr = vectors * lanes;

  // Rows of gapless k become columns of the panel, lanes x lanes elements at a time in registers.
  template <int width, int from>
  static void pack_transposed(const T* source, int64_t stride, int64_t count, int64_t k, T* panel) {
    constexpr int rows = width - from < lanes ? width - from : lanes;
    for (int64_t p = 0; p < k; p += lanes) {
      const int64_t left = k - p;
      V block[lanes] = {};
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
        if (from + i >= count) break;
        const T* row = source + (from + i) * stride + p;
        block[i] = load_up_to(row, left);
      }
      M::transpose(block);
#pragma GCC unroll 16
      for (int q = 0; q < lanes; q++) {
        if (q >= left) break;
        T* group = panel + (p + q) * width + from;
        // Where one vector holds the whole group of k, what it writes too much is overwritten by the next.
        if (rows == lanes || (rows == width && p + q + 1 < k)) {
          M::store(group, block[q]);
        } else {
          M::store_first(group, block[q], rows);
        }
      }
    }
    if constexpr (from + rows < width) pack_transposed<width, from + rows>(source, stride, count, k, panel);
  }

  template <int width>
  static void pack(const T* source, int64_t stride, int64_t k_stride, int64_t count, int64_t k, T* panel) {
    if (stride == 1 && count == width) {
      for (int64_t p = 0; p < k; p++) __builtin_memcpy(panel + p * width, source + p * k_stride, width * sizeof(T));
    } else if (k_stride == 1 && k > 1) {
      pack_transposed<width, 0>(source, stride, count, k, panel);
    } else {
      for (int64_t p = 0; p < k; p++) {
        for (int64_t i = 0; i < count; i++) panel[p * width + i] = source[i * stride + p * k_stride];
        for (int64_t i = count; i < width; i++) panel[p * width + i] = 0;
      }
    }
  }

  // Rows and vectors of the register tile that a block's edge leaves empty are not computed.
  template <int rows, int used>
  static void microkernel(int64_t k, const T* a, const T* b, int64_t b_step, T* tile, int64_t tile_step) {
    V sum[rows][used] = {};
    for (int64_t p = 0; p < k; p++) {
      V row[used];
#pragma GCC unroll 4
      for (int j = 0; j < used; j++) row[j] = M::load(b + j * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
        const V x = M::broadcast(a[i]);
#pragma GCC unroll 4
        for (int j = 0; j < used; j++) sum[i][j] += x * row[j];
      }
      a += mr;
      b += b_step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < used; j++) M::store(tile + i * tile_step + j * lanes, sum[i][j]);
    }
  }

  template <class Sequence> struct Microkernels;
  template <int... i> struct Microkernels<typename M::template Indices<i...>> {
    static constexpr Microkernel<T> all[] = {&microkernel<i / vectors + 1, i % vectors + 1>...};
  };

  // Inner products along k, in vectors.
  template <int rows, int columns>
  static void dot(int64_t k, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* tile) {
    V sum[rows][columns] = {};
    for (int64_t p = 0; p < k; p += lanes) {
      const int64_t left = k - p;
      V x[rows];
#pragma GCC unroll 4
      for (int i = 0; i < rows; i++) x[i] = load_up_to(a + i * a_stride + p, left);
#pragma GCC unroll 4
      for (int j = 0; j < columns; j++) {
        const V y = load_up_to(b + j * b_stride + p, left);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) sum[i][j] += x[i] * y;
      }
    }
    for (int i = 0; i < rows; i++) {
      for (int j = 0; j < columns; j++) tile[i * nr + j] = M::sum(sum[i][j]);
    }
  }

  static V load_up_to(const T* p, int64_t n) { return n < lanes ? M::load_first(p, n) : M::load(p); }
  static void store_up_to(T* p, V v, int64_t n) { n < lanes ? M::store_first(p, v, n) : M::store(p, v); }

  template <int rows>
  static void dot_rows(int64_t columns, int64_t k, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                       T* tile) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) dot<rows, 4>(k, a, a_stride, b + j * b_stride, b_stride, tile + j);
    for (; j < columns; j++) dot<rows, 1>(k, a, a_stride, b + j * b_stride, b_stride, tile + j);
  }

  static void dot_tile(int64_t rows, int64_t columns, int64_t k, const T* a, int64_t a_stride, const T* b,
                       int64_t b_stride, T* tile) {
    for (; rows >= 4; rows -= 4, a += 4 * a_stride, tile += 4 * nr) {
      dot_rows<4>(columns, k, a, a_stride, b, b_stride, tile);
    }
    if (rows >= 2) {
      dot_rows<2>(columns, k, a, a_stride, b, b_stride, tile);
      a += 2 * a_stride;
      tile += 2 * nr;
    }
    if (rows % 2) dot_rows<1>(columns, k, a, a_stride, b, b_stride, tile);
  }

  static void panel_sums(int64_t k, const T* panel, T* sums) {
    for (int i = 0; i < mr; i += lanes) {
      V even = {}, odd = {};
      int64_t p = 0;
      for (; p + 2 <= k; p += 2) {
        even += M::load(panel + p * mr + i);
        odd += M::load(panel + (p + 1) * mr + i);
      }
      if (p < k) even += M::load(panel + p * mr + i);
      // Lanes past mr hold values of the next group of k; the caller ignores them.
      M::store(sums + i, M::load(sums + i) + (even + odd));
    }
  }

  template <class A> static void epilogue(const Epilogue<T>& arguments) {
    const Epilogue<T> e = arguments;  // stores through output cannot change a copy
    for (int64_t i = 0; i < e.rows; i++) {
      T* output = e.output + i * e.leading_dimension;
      T* pre_activation = e.pre_activation ? e.pre_activation + i * e.leading_dimension : nullptr;
      for (int64_t j = 0; j < e.columns; j += lanes) {
        const int64_t left = e.columns - j;
        V v = M::load(e.tile + i * nr + j);
        if (!e.first) v += load_up_to(output + j, left);
        if (e.last) {
          if (e.bias) v += M::load(e.bias + j);
          if (pre_activation) store_up_to(pre_activation + j, v, left);
          v = A::template value<M>(v, e.scalars);
        }
        store_up_to(output + j, v, left);
      }
    }
  }

  template <class A> static void gradient(int64_t n, const T* g, const T* saved, T* out, Scalars p) {
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
      M::store(out + i, A::template gradient<M>(M::load(g + i), M::load(saved + i), p));
    }
    if (i < n) {
      const V v = A::template gradient<M>(M::load_first(g + i, n - i), M::load_first(saved + i, n - i), p);
      M::store_first(out + i, v, n - i);
    }
  }

  template <class A> static void value(int64_t n, const T* pre, T* out, Scalars p) {
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) M::store(out + i, A::template value<M>(M::load(pre + i), p));
    if (i < n) M::store_first(out + i, A::template value<M>(M::load_first(pre + i, n - i), p), n - i);
  }

  template <class List> struct Activation;
  template <class... A> struct Activation<ActivationList<A...>> {
    static constexpr ActivationKernels<T> rows[] = {{&epilogue<A>, &gradient<A>, &value<A>}...};
  };

  static constexpr Kernels<T> kernels() {
    using Tiles = typename M::template Counting<mr * vectors>::Type;
    return {mr,        nr,          Size::mc,
            Size::nc,  Size::kc,    lanes,
            &pack<mr>, &pack<nr>,   Microkernels<Tiles>::all,
            &dot_tile, &panel_sums, Activation<Activations>::rows};
  }
};

static void mark() { last_isa = Isa::name; }

static constexpr KernelTable make_table() {
  return {Isa::name, Isa::description, Isa::needs, Leaf<float>::kernels(), Leaf<double>::kernels(), &mark};
}

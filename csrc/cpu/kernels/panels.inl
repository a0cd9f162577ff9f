// The kernels of frozen networks. A tile of C takes several panels of B side by side, as many as registers allow, so
// that even few rows keep many sums going at once. Each sum is one chain of products along ascending k. Included by
// kernels.inl after storage.inl; must not include anything.

template <class S> struct Panels {
  using C = Compute<S>;
  using M = Arithmetic<S>;
  using V = typename M::V;
  using F = Factors<S>;
  static constexpr Tiles size = tiles_of<S>;
  static constexpr int lanes = M::lanes;
  static constexpr int mr = size.mr;
  static constexpr int nr = size.vectors * lanes;

  // How many vectors a tile of so many rows is wide: whole panels, as many as leave registers for the factors.
  static constexpr int widest(int rows) {
    int vectors = most_panels * size.vectors;
    while (vectors > size.vectors && rows * vectors + (rows < vectors ? rows : vectors) + 1 > registers) {
      vectors -= size.vectors;
    }
    return vectors;
  }
  static constexpr int registers = mr * size.vectors + size.vectors + 2;

  template <int rows, int used>
  [[gnu::always_inline]] static void multiply(const PanelTile<S>& t, V (&sum)[rows][used]) {
    constexpr int group = 4;  // rows that one pointer serves
    const C* a[(rows + group - 1) / group];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i += group) a[i / group] = t.a + i * t.a_step;
    const C* b = t.b;
    // Nothing to prefetch: prefetch B's panel again, so that the loop stays free of branches.
    const char* weights = static_cast<const char*>(t.weights_ahead ? t.weights_ahead : t.b);
    const char* input = static_cast<const char*>(t.input_ahead ? t.input_ahead : t.b);
    const int64_t weights_step = t.weights_ahead ? t.weights_step : 0, input_step = t.input_ahead ? t.input_step : 0;
    for (int64_t u = 0; u < t.units; u++) {
      if constexpr (rows >= used) {
        constexpr int into_l2 = 2;
        __builtin_prefetch(weights, 0, into_l2);
        __builtin_prefetch(input, 0, into_l2);
        weights += weights_step;
        input += input_step;
      }
      if constexpr (rows < used) {
        V x[rows];
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) x[i] = F::broadcast(&a[i / group][i % group * t.a_step]);
#pragma GCC unroll 8
        for (int j = 0; j < used; j++) {
          const V y = M::load(b + j / size.vectors * t.b_panel + j % size.vectors * lanes);
#pragma GCC unroll 16
          for (int i = 0; i < rows; i++) sum[i][j] = F::multiply_add(sum[i][j], x[i], y);
        }
      } else {
        V y[used];
#pragma GCC unroll 8
        for (int j = 0; j < used; j++) y[j] = M::load(b + j / size.vectors * t.b_panel + j % size.vectors * lanes);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
          const V x = F::broadcast(&a[i / group][i % group * t.a_step]);
#pragma GCC unroll 8
          for (int j = 0; j < used; j++) sum[i][j] = F::multiply_add(sum[i][j], x, y[j]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < rows; i += group) a[i / group] += t.a_unit;
      b += nr;
    }
  }

  template <int rows, int used> static void kernel(const PanelTile<S>& t) {
    V sum[rows][used] = {};
    multiply<rows, used>(t, sum);
    if (t.add) {
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < used; j++) sum[i][j] += M::load(t.sums + i * t.sums_step + j * lanes);
      }
    }
    if (t.bias) {
#pragma GCC unroll 8
      for (int j = 0; j < used; j++) {
        const V bias = M::load(t.bias + j * lanes);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) sum[i][j] += bias;
      }
    }
    if (t.row_bias) {
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
        const V bias = M::broadcast(t.row_bias[i]);
#pragma GCC unroll 8
        for (int j = 0; j < used; j++) sum[i][j] += bias;
      }
    }
    if (!t.output) {
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < used; j++) M::store(t.sums + i * t.sums_step + j * lanes, sum[i][j]);
      }
      return;
    }
    if (t.relu) {
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < used; j++) sum[i][j] = Relu::value<M>(sum[i][j], Scalars{});
      }
    }
    const int64_t last = t.columns - (used - 1) * lanes;
    const bool whole = last >= lanes;
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
      S* row = t.output + i * t.output_step;
#pragma GCC unroll 8
      for (int j = 0; j + 1 < used; j++) Storage<S>::store(row + place(j, t.output_panel), sum[i][j]);
      if (whole) {
        Storage<S>::store(row + place(used - 1, t.output_panel), sum[i][used - 1]);
      } else {
        Storage<S>::store_first(row + place(used - 1, t.output_panel), sum[i][used - 1], last);
      }
    }
  }

  static int64_t place(int j, int64_t panel) { return j / size.vectors * panel + j % size.vectors * lanes; }

  template <int rows, int used> static constexpr PanelKernel<S> kernel_if_it_fits() {
    if constexpr (used <= widest(rows)) {
      return &kernel<rows, used>;
    } else {
      return nullptr;
    }
  }

  static constexpr int per_row = most_panels * size.vectors;
  template <class Sequence> struct Table;
  template <int... i> struct Table<typename M::template Indices<i...>> {
    static constexpr PanelKernel<S> kernels[] = {kernel_if_it_fits<i / per_row + 1, i % per_row + 1>()...};
  };
  using All = Table<typename M::template Counting<mr * per_row>::Type>;
  template <class Sequence> struct Widths;
  template <int... i> struct Widths<typename M::template Indices<i...>> {
    static constexpr int64_t widths[] = {widest(i + 1) / size.vectors...};
  };
  using AllWidths = Widths<typename M::template Counting<mr>::Type>;
};

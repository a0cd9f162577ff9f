// Batch normalisation of columns, and its gradients. Included by kernels.inl inside an ISA's namespace and target
// region, after storage.inl; must not include anything. Works on tiles of a few rows and vectors, which stay in the L1
// cache while they are read twice: for their means, and for the squared deviations from these. The tiles of a column
// are joined by the formula of Chan, Golub and LeVeque, so that no deviation is from anything but a mean of its own.

template <class S> struct Columns {
  using M = Math<S>;
  using V = typename M::V;
  static constexpr int lanes = M::lanes;
  static constexpr int64_t tile_rows = 32;  // also the longest chain of additions
  static constexpr int tile_vectors = 4;
  static constexpr int64_t page_bytes = 4096;

  // The rows of a tile that is written, too: at most a page of them. Where a row fills a page, going along rows
  // takes 1.5 ms for 4096 x 1024 float32 elements that come from memory, and going down 32 of them 2.2 ms.
  static int64_t rows_of_page(int64_t columns) {
    const int64_t rows = page_bytes / (columns * int64_t(sizeof(S)));
    return rows < 1 ? 1 : rows < tile_rows ? rows : tile_rows;
  }

  // Calls f.run<vectors>(j, left) for each stretch of columns from j on, of which `left` are there in all; less than a
  // vector only where there is one.
  template <class F> static void over(int64_t columns, const F& f) {
    int64_t j = 0;
    for (; j + tile_vectors * lanes <= columns; j += tile_vectors * lanes) {
      f.template run<tile_vectors>(j, tile_vectors * lanes);
    }
    for (; j < columns; j += lanes) f.template run<1>(j, columns - j);
  }
  template <int vectors> static V load(const S* p, int v, int64_t left) {
    if constexpr (vectors > 1) return M::load(p + v * lanes);
    return load_up_to(p, left);
  }
  template <int vectors> static void store(S* p, int v, V value, int64_t left) {
    if constexpr (vectors > 1) {
      M::store(p + v * lanes, value);
    } else {
      store_up_to(p, value, left);
    }
  }

  // 1 / sqrt(variance + eps), of zero 0, as torch has it where there is neither.
  static V rstd_of(V variance, V eps) {
    const V sum = variance + eps;
    return sum == V{} ? V{} : M::fill(1) / M::sqrt(sum);
  }

  // How much counts of rows weigh when their moments are joined.
  struct Weights {
    V of_mean, of_squares;
    Weights(int64_t before, int64_t more)
        : of_mean(M::fill(double(more) / double(before + more))),
          of_squares(M::fill(double(before) * double(more) / double(before + more))) {}
  };
  static void join_into(V& mean, V& squares, V more_mean, V more_squares, const Weights& weights) {
    const V apart = more_mean - mean;
    const V joined = mean + apart * weights.of_mean;
    // A mean that is infinite stays so.
    mean = joined == joined ? joined : mean + more_mean;
    squares += more_squares + apart * apart * weights.of_squares;
  }

  struct Moments {
    int64_t rows, step;
    const S* x;
    int64_t before;
    S *mean, *squares;

    template <int vectors> void run(int64_t j, int64_t left) const {
      V means[vectors], all[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        means[v] = before > 0 ? load<vectors>(mean + j, v, left) : V{};
        all[v] = before > 0 ? load<vectors>(squares + j, v, left) : V{};
      }
      for (int64_t from = 0; from < rows; from += tile_rows) {
        const int64_t count = rows - from < tile_rows ? rows - from : tile_rows;
        add_tile<vectors>(count, x + from * step + j, before + from, left, means, all);
      }
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        store<vectors>(mean + j, v, means[v], left);
        store<vectors>(squares + j, v, all[v], left);
      }
    }

    template <int vectors>
    void add_tile(int64_t count, const S* tile, int64_t earlier, int64_t left, V (&means)[vectors],
                  V (&all)[vectors]) const {
      V sums[vectors] = {}, deviations[vectors] = {};
      for (int64_t i = 0; i < count; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[v] += load<vectors>(tile + i * step, v, left);
      }
      const V n = M::fill(double(count));
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) sums[v] /= n;
      for (int64_t i = 0; i < count; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
          const V d = load<vectors>(tile + i * step, v, left) - sums[v];
          deviations[v] += d * d;
        }
      }
      const Weights weights(earlier, count);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        if (earlier > 0) {
          join_into(means[v], all[v], sums[v], deviations[v], weights);
        } else {
          means[v] = sums[v];
          all[v] = deviations[v];
        }
      }
    }
  };

  static void add_rows(int64_t rows, int64_t columns, int64_t step, const S* x, int64_t before, S* mean, S* squares) {
    over(columns, Moments{rows, step, x, before, mean, squares});
  }

  static void join(int64_t columns, int64_t before, S* mean, S* squares, int64_t more, const S* their_mean,
                   const S* their_squares) {
    const Weights weights(before, more);
    for (int64_t j = 0; j < columns; j += lanes) {
      const int64_t left = columns - j;
      V m = load_up_to(mean + j, left), s = load_up_to(squares + j, left);
      join_into(m, s, load_up_to(their_mean + j, left), load_up_to(their_squares + j, left), weights);
      store_up_to(mean + j, m, left);
      store_up_to(squares + j, s, left);
    }
  }

  // Moves a running statistic, if there is one.
  static void move(void* running, int64_t j, V towards, double momentum, int64_t left) {
    if (!running) return;
    S* const at = static_cast<S*>(running) + j;
    store_up_to(at, M::fill(momentum) * towards + M::fill(1 - momentum) * load_up_to(at, left), left);
  }

  static void settle(const BatchNormPass& pass, const S* mean, S* squares) {
    const BatchNormPass p = pass;  // stores cannot change a copy
    const V rows = M::fill(double(p.shape.rows)), fewer = M::fill(double(p.shape.rows - 1)), eps = M::fill(p.eps);
    for (int64_t j = 0; j < p.shape.columns; j += lanes) {
      const int64_t left = p.shape.columns - j;
      const V m = load_up_to(mean + j, left), s = load_up_to(squares + j, left), rstd = rstd_of(s / rows, eps);
      if (p.mean) store_up_to(static_cast<S*>(p.mean) + j, m, left);
      if (p.rstd) store_up_to(static_cast<S*>(p.rstd) + j, rstd, left);
      move(p.running_mean, j, m, p.momentum, left);
      move(p.running_variance, j, s / fewer, p.momentum, left);
      store_up_to(squares + j, rstd, left);
    }
  }

  static void rstd(int64_t columns, const S* variance, double eps, S* out) {
    for (int64_t j = 0; j < columns; j += lanes) {
      store_up_to(out + j, rstd_of(load_up_to(variance + j, columns - j), M::fill(eps)), columns - j);
    }
  }

  struct Normalise {
    int64_t rows, step;
    const S *x, *mean, *rstd, *weight, *bias;
    S* output;

    template <int vectors> void run(int64_t j, int64_t left) const {
      V means[vectors], scales[vectors], shifts[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        means[v] = load<vectors>(mean + j, v, left);
        scales[v] = load<vectors>(rstd + j, v, left);
        if (weight) scales[v] *= load<vectors>(weight + j, v, left);
        shifts[v] = bias ? load<vectors>(bias + j, v, left) : V{};
      }
      for (int64_t i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
          const V d = load<vectors>(x + i * step + j, v, left) - means[v];
          store<vectors>(output + i * step + j, v, d * scales[v] + shifts[v], left);
        }
      }
    }
  };

  static void normalise(const BatchNormPass& p, int64_t begin, int64_t end, const S* mean, const S* rstd) {
    const int64_t step = p.shape.columns, most = rows_of_page(step);
    for (int64_t from = begin; from < end; from += most) {
      const int64_t rows = end - from < most ? end - from : most;
      over(step, Normalise{rows, step, static_cast<const S*>(p.input) + from * step, mean, rstd,
                           static_cast<const S*>(p.weight), static_cast<const S*>(p.bias),
                           static_cast<S*>(p.output) + from * step});
    }
  }

  struct Sums {
    int64_t rows, step;
    const S *g, *x, *mean;
    S *plain, *scaled;

    template <int vectors> void run(int64_t j, int64_t left) const {
      V means[vectors], first[vectors], second[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        means[v] = load<vectors>(mean + j, v, left);
        first[v] = load<vectors>(plain + j, v, left);
        second[v] = load<vectors>(scaled + j, v, left);
      }
      for (int64_t from = 0; from < rows; from += tile_rows) {
        const int64_t end = rows - from < tile_rows ? rows : from + tile_rows;
        V a[vectors] = {}, b[vectors] = {};
        for (int64_t i = from; i < end; i++) {
#pragma GCC unroll 4
          for (int v = 0; v < vectors; v++) {
            const V grad = load<vectors>(g + i * step + j, v, left);
            a[v] += grad;
            b[v] += grad * (load<vectors>(x + i * step + j, v, left) - means[v]);
          }
        }
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
          first[v] += a[v];
          second[v] += b[v];
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        store<vectors>(plain + j, v, first[v], left);
        store<vectors>(scaled + j, v, second[v], left);
      }
    }
  };

  static void add_gradients(int64_t rows, int64_t columns, int64_t step, const S* g, const S* x, const S* mean,
                            S* plain, S* scaled) {
    over(columns, Sums{rows, step, g, x, mean, plain, scaled});
  }

  static void settle_gradients(const BatchNormBackwardPass& pass, const S* rstd, S* plain, S* scaled) {
    const BatchNormBackwardPass p = pass;
    const V rows = M::fill(double(p.shape.rows));
    for (int64_t j = 0; j < p.shape.columns; j += lanes) {
      const int64_t left = p.shape.columns - j;
      const V first = load_up_to(plain + j, left), r = load_up_to(rstd + j, left);
      const V second = load_up_to(scaled + j, left) * r;
      if (p.grad_weight) store_up_to(static_cast<S*>(p.grad_weight) + j, second, left);
      if (p.grad_bias) store_up_to(static_cast<S*>(p.grad_bias) + j, first, left);
      store_up_to(plain + j, first / rows, left);
      store_up_to(scaled + j, second * r / rows, left);
    }
  }

  struct Gradient {
    int64_t rows, step;
    const S *g, *x, *mean, *rstd, *weight, *plain, *scaled;
    S* output;

    template <int vectors> void run(int64_t j, int64_t left) const {
      V scales[vectors], means[vectors] = {}, first[vectors] = {}, second[vectors] = {};
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) {
        scales[v] = load<vectors>(rstd + j, v, left);
        if (weight) scales[v] *= load<vectors>(weight + j, v, left);
        if (!plain) continue;
        means[v] = load<vectors>(mean + j, v, left);
        first[v] = load<vectors>(plain + j, v, left);
        second[v] = load<vectors>(scaled + j, v, left);
      }
      for (int64_t i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
          V d = load<vectors>(g + i * step + j, v, left);
          if (plain) d = d - first[v] - (load<vectors>(x + i * step + j, v, left) - means[v]) * second[v];
          store<vectors>(output + i * step + j, v, d * scales[v], left);
        }
      }
    }
  };

  static void gradient(const BatchNormBackwardPass& p, int64_t begin, int64_t end, const S* rstd, const S* plain,
                       const S* scaled) {
    const int64_t step = p.shape.columns, most = rows_of_page(step);
    for (int64_t from = begin; from < end; from += most) {
      const int64_t rows = end - from < most ? end - from : most;
      over(step, Gradient{rows, step, static_cast<const S*>(p.grad) + from * step,
                          static_cast<const S*>(p.input) + from * step, static_cast<const S*>(p.mean), rstd,
                          static_cast<const S*>(p.weight), plain, scaled, static_cast<S*>(p.grad_input) + from * step});
    }
  }

  static constexpr BatchNormKernels<S> kernels = {&add_rows,  &join,          &settle,           &rstd,
                                                  &normalise, &add_gradients, &settle_gradients, &gradient};
};

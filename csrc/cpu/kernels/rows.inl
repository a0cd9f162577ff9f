// Layer normalisation of rows, and its gradients. Included by kernels.inl inside an ISA's namespace and target region,
// after storage.inl; must not include anything. As many rows as a vector has lanes are worked on together: what is one
// number of each row is then one vector.

template <class S> struct Rows {
  using M = Math<S>;
  using V = typename M::V;
  using I = typename M::I;
  static constexpr int lanes = M::lanes;

  // A sum in chains of 32, as errors grow with the longest one.
  struct Sum {
    static constexpr int chain = 32;
    V total = {}, part = {};
    int terms = 0;

    void add(V v) {
      part += v;
      if (++terms < chain) return;
      total += part;
      part = V{};
      terms = 0;
    }
    V value() const { return total + part; }
  };

  template <int... l> static I counted(typename M::template Indices<l...>) { return I{l...}; }
  // Zero where a vector that begins `left` elements before the end of a row has lanes past it.
  static V inside(V v, int64_t left) {
    if (left >= lanes) return v;
    const I lane = counted(typename M::template Counting<lanes>::Type{});
    return lane < typename M::Bits(left) ? v : V{};
  }
  static V minus(const S* x, V mean, int64_t left) { return inside(load_up_to(x, left) - mean, left); }

  // Elements that are read in the same order in all passes below.
  static V sum_of(int64_t n, const S* x) {
    Sum sum;
    for (int64_t j = 0; j < n; j += lanes) sum.add(load_up_to(x + j, n - j));
    return sum.value();
  }
  static V squares_of(int64_t n, const S* x, V mean) {
    Sum sum;
    for (int64_t j = 0; j < n; j += lanes) {
      const V d = minus(x + j, mean, n - j);
      sum.add(d * d);
    }
    return sum.value();
  }

  static void normalise(const LayerNormPass& p, const S* x, V mean, V rstd, S* output) {
    const S *weight = static_cast<const S*>(p.weight), *bias = static_cast<const S*>(p.bias);
    const int64_t n = p.shape.columns;
    for (int64_t j = 0; j < n; j += lanes) {
      V y = (load_up_to(x + j, n - j) - mean) * rstd;
      if (weight) y *= load_up_to(weight + j, n - j);
      if (bias) y += load_up_to(bias + j, n - j);
      store_up_to(output + j, y, n - j);
    }
  }

  static void layer_norm(const LayerNormPass& pass, int64_t begin, int64_t end) {
    const LayerNormPass p = pass;  // stores cannot change a copy
    const int64_t n = p.shape.columns;
    const V count = M::fill(double(n));
    for (int64_t from = begin; from < end; from += lanes) {
      const int rows = end - from < lanes ? int(end - from) : lanes;
      const S* x = static_cast<const S*>(p.input) + from * n;
      V sums[lanes] = {};
      S means[lanes], rstds[lanes];
      for (int i = 0; i < rows; i++) sums[i] = sum_of(n, x + i * n);
      const V mean = M::sums(sums) / count;
      M::store(means, mean);
      for (int i = 0; i < rows; i++) sums[i] = squares_of(n, x + i * n, M::broadcast(means[i]));
      const V rstd = M::fill(1) / M::sqrt(M::sums(sums) / count + M::fill(p.eps));
      M::store(rstds, rstd);
      store_up_to(static_cast<S*>(p.mean) + from, mean, rows);
      store_up_to(static_cast<S*>(p.rstd) + from, rstd, rows);
      S* output = static_cast<S*>(p.output) + from * n;
      for (int i = 0; i < rows; i++) {
        normalise(p, x + i * n, M::broadcast(means[i]), M::broadcast(rstds[i]), output + i * n);
      }
    }
  }

  // Of some rows the means of g w and of g w (x - mean) rstd.
  struct Means {
    S plain[lanes], scaled[lanes];
  };
  static void find_means(int rows, int64_t n, const S* g, const S* x, const S* mean, const S* rstd, const S* weight,
                         Means& means) {
    V plain[lanes] = {}, scaled[lanes] = {};
    for (int i = 0; i < rows; i++) {
      const V m = M::broadcast(mean[i]), r = M::broadcast(rstd[i]);
      Sum first, second;
      for (int64_t j = 0; j < n; j += lanes) {
        V v = load_up_to(g + i * n + j, n - j);
        if (weight) v *= load_up_to(weight + j, n - j);
        first.add(v);
        second.add(v * (minus(x + i * n + j, m, n - j) * r));
      }
      plain[i] = first.value();
      scaled[i] = second.value();
    }
    const V count = M::fill(double(n));
    M::store(means.plain, M::sums(plain) / count);
    M::store(means.scaled, M::sums(scaled) / count);
  }

  // Adds the rows' shares to sums that are not null.
  static void layer_norm_backward(const LayerNormBackwardPass& pass, int64_t begin, int64_t end, S* weight_sums,
                                  S* bias_sums) {
    const int64_t n = pass.shape.columns;
    const S* const weight = static_cast<const S*>(pass.weight);
    const bool of_input = pass.grad_input;
    for (int64_t from = begin; from < end; from += lanes) {
      const int rows = end - from < lanes ? int(end - from) : lanes;
      const S *g = static_cast<const S*>(pass.grad) + from * n, *x = static_cast<const S*>(pass.input) + from * n;
      const S *mean = static_cast<const S*>(pass.mean) + from, *rstd = static_cast<const S*>(pass.rstd) + from;
      S* const output = of_input ? static_cast<S*>(pass.grad_input) + from * n : nullptr;
      Means means;
      if (of_input) find_means(rows, n, g, x, mean, rstd, weight, means);
      for (int64_t j = 0; j < n; j += lanes) {
        const int64_t left = n - j;
        const V w = weight ? load_up_to(weight + j, left) : M::fill(1);
        V of_weight = {}, of_bias = {};
        for (int i = 0; i < rows; i++) {
          const V r = M::broadcast(rstd[i]), v = load_up_to(g + i * n + j, left);
          const V normal = minus(x + i * n + j, M::broadcast(mean[i]), left) * r;
          of_weight += v * normal;
          of_bias += v;
          if (of_input) {
            const V d = v * w - M::broadcast(means.plain[i]) - normal * M::broadcast(means.scaled[i]);
            store_up_to(output + i * n + j, r * d, left);
          }
        }
        if (weight_sums) store_up_to(weight_sums + j, load_up_to(weight_sums + j, left) + of_weight, left);
        if (bias_sums) store_up_to(bias_sums + j, load_up_to(bias_sums + j, left) + of_bias, left);
      }
    }
  }
};

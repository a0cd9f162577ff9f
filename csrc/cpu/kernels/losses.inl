// Losses and their gradients on runs and rows of an output, and the softmax of rows. Included by kernels.inl inside an
// ISA's namespace and target region, after storage.inl; must not include anything.

// Adds up in double what lies in vectors, in short chains of them.
template <class S> struct Total {
  using C = Compute<S>;
  using M = Arithmetic<S>;
  static constexpr int chain = 32;

  double sum = 0;
  typename M::V part = {};
  int terms = 0;

  void add(typename M::V v) {
    part += v;
    if (++terms == chain) flush();
  }
  // The first n lanes.
  void add_first(typename M::V v, int64_t n) {
    C lanes[M::lanes];
    M::store(lanes, v);
    for (int64_t i = 0; i < n && i < M::lanes; i++) sum += double(lanes[i]);
  }
  void flush() {
    add_first(part, M::lanes);
    part = typename M::V{};
    terms = 0;
  }
};

template <class S> struct Loss {
  using C = Compute<S>;
  using M = Arithmetic<S>;
  using V = typename M::V;
  static constexpr int lanes = M::lanes;

  template <class L>
  static double elements(int64_t n, const S* output, const S* target, const S* weight, double scale, Scalars p,
                         S* grad) {
    const V by = M::fill(scale);
    Total<S> total;
    for (int64_t i = 0; i < n; i += lanes) {
      const int64_t left = n - i;
      const V y = load_up_to(output + i, left), t = load_up_to(target + i, left);
      const V w = weight ? load_up_to(weight + i, left) : M::fill(1);
      const V value = L::template value<M>(y, t, w, p);
      left < lanes ? total.add_first(value, left) : total.add(value);
      store_up_to(grad + i, L::template gradient<M>(by, y, t, w, p), left);
    }
    total.flush();
    return total.sum;
  }

  static double load_one(const S* p) { return double(Storage<S>::load_first(p, 1)[0]); }

  static double largest(int64_t n, const S* x) {
    double most = load_one(x);
    int64_t i = 0;
    if (n >= lanes) {
      V v = Storage<S>::load(x);
      for (i = lanes; i + lanes <= n; i += lanes) {
        const V next = Storage<S>::load(x + i);
        v = next > v ? next : v;
      }
      C all[lanes];
      M::store(all, v);
      for (int l = 0; l < lanes; l++) most = double(all[l]) > most ? double(all[l]) : most;
    }
    for (; i < n; i++) {
      const double one = load_one(x + i);
      most = one > most ? one : most;
    }
    return most;
  }

  // The sum of e^(x - shift) over a row.
  static double sum_of_exponentials(int64_t n, const S* x, V shift) {
    Total<S> total;
    for (int64_t i = 0; i < n; i += lanes) {
      const V e = M::exp(load_up_to(x + i, n - i) - shift);
      n - i < lanes ? total.add_first(e, n - i) : total.add(e);
    }
    total.flush();
    return total.sum;
  }

  static void head(int64_t rows, int64_t n, bool log, S* x) {
    for (int64_t row = 0; n > 0 && row < rows; row++, x += n) {
      const V shift = M::fill(largest(n, x));
      const double sum = sum_of_exponentials(n, x, shift);
      const V by = M::fill(log ? __builtin_log(sum) : sum);
      for (int64_t i = 0; i < n; i += lanes) {
        const V d = load_up_to(x + i, n - i) - shift;
        store_up_to(x + i, log ? d - by : M::exp(d) / by, n - i);
      }
    }
  }

  // -sum over c of q_c log p_c, where p is the softmax of the output and q_c the weight w_c times (1 - smoothing for
  // the row's class, 0 else) + smoothing / classes. Its gradient is p_c sum(q) - q_c, times `scale`.
  static double cross_entropy(int64_t n, const S* output, int64_t target, const S* weight, double weights,
                              double smoothing, double scale, S* grad) {
    const double most = largest(n, output);
    const V shift = M::fill(most);
    const double sum = sum_of_exponentials(n, output, shift), log_sum = __builtin_log(sum);
    const double even = smoothing / double(n);
    const double own = (1 - smoothing) * (weight ? load_one(weight + target) : 1.0);
    const double at_target = load_one(output + target) - most;
    double loss = own * (log_sum - at_target);
    if (smoothing != 0) {
      double weighted = 0;
      for (int64_t c = 0; c < n; c++) {
        weighted += (weight ? load_one(weight + c) : 1.0) * (log_sum - (load_one(output + c) - most));
      }
      loss += even * weighted;
    }
    const double all = own + even * weights;
    const V by = M::fill(scale * all / sum), evenly = M::fill(scale * even), one = M::fill(1);
    const C rest = C(scale * own);
    for (int64_t i = 0; i < n; i += lanes) {
      const int64_t left = n - i;
      const V w = weight ? load_up_to(weight + i, left) : one;
      V g = by * M::exp(load_up_to(output + i, left) - shift);
      if (smoothing != 0) g -= evenly * w;
      if (target >= i && target - i < lanes) g[target - i] -= rest;
      store_up_to(grad + i, g, left);
    }
    return loss;
  }

  // Null for a loss that needs a whole row.
  template <class L> static constexpr ElementLoss<S> kernel_of() {
    if constexpr (L::info.takes_classes) {
      return nullptr;
    } else {
      return &elements<L>;
    }
  }

  template <class List> struct Table;
  template <class... L> struct Table<LossList<L...>> {
    static constexpr ElementLoss<S> rows[] = {kernel_of<L>()...};
  };
};

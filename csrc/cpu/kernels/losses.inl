// Losses and their gradients on runs and rows of an output, and the update of parameters: what a training step does
// besides its products. Included by kernels.inl inside an ISA's namespace and target region, after storage.inl; must
// not include anything.

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

  // -sum over c of q_c log p_c, where p is the softmax of the output and q_c the weight w_c times (1 - smoothing for
  // the row's class, 0 else) + smoothing / classes. Its gradient is p_c sum(q) - q_c, times `scale`.
  static double cross_entropy(int64_t n, const S* output, int64_t target, const S* weight, double weights,
                              double smoothing, double scale, S* grad) {
    const double most = largest(n, output);
    const V shift = M::fill(most);
    Total<S> total;
    for (int64_t i = 0; i < n; i += lanes) {
      const V e = M::exp(load_up_to(output + i, n - i) - shift);
      n - i < lanes ? total.add_first(e, n - i) : total.add(e);
    }
    total.flush();
    const double sum = total.sum, log_sum = __builtin_log(sum);
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

  template <class List> struct Table;
  template <class... L> struct Table<LossList<L...>> {
    static constexpr ElementLoss<S> rows[] = {&elements<L>...};
  };
};

// Elements [begin, end) of a parameter, by the formulas of torch.optim. What is stored is rounded; what is used again
// in the same step is not.
template <class S> struct Step {
  using M = Arithmetic<S>;
  using V = typename M::V;
  static constexpr int lanes = M::lanes;

  static void sgd(const Update& update, int64_t begin, int64_t end) {
    const UpdateSpec u = update.spec;
    S* const parameter = static_cast<S*>(update.parameter);
    const S* const grad = static_cast<const S*>(update.grad);
    S* const buffer = static_cast<S*>(update.state[0]);
    const V lr = M::fill(u.lr), decay = M::fill(u.weight_decay), momentum = M::fill(u.momentum),
            rest = M::fill(1 - u.dampening);
    for (int64_t i = begin; i < end; i += lanes) {
      const int64_t left = end - i;
      const V p = load_up_to(parameter + i, left);
      V g = load_up_to(grad + i, left);
      if (u.maximize) g = -g;
      if (u.weight_decay != 0) g += decay * p;
      if (buffer) {
        const V b = u.first ? g : momentum * load_up_to(buffer + i, left) + rest * g;
        store_up_to(buffer + i, b, left);
        g = u.nesterov ? g + momentum * b : b;
      }
      store_up_to(parameter + i, p - lr * g, left);
    }
  }

  static void adam(const Update& update, int64_t begin, int64_t end) {
    const UpdateSpec u = update.spec;
    S* const parameter = static_cast<S*>(update.parameter);
    const S* const grad = static_cast<const S*>(update.grad);
    S* const first = static_cast<S*>(update.state[0]);
    S* const second = static_cast<S*>(update.state[1]);
    S* const most = static_cast<S*>(update.state[2]);
    const V decay = M::fill(u.weight_decay), kept = M::fill(1 - u.lr * u.weight_decay), beta1 = M::fill(u.beta1),
            rest1 = M::fill(1 - u.beta1), beta2 = M::fill(u.beta2), rest2 = M::fill(1 - u.beta2), eps = M::fill(u.eps),
            root = M::fill(u.root), step_size = M::fill(u.step_size);
    for (int64_t i = begin; i < end; i += lanes) {
      const int64_t left = end - i;
      V p = load_up_to(parameter + i, left), g = load_up_to(grad + i, left);
      if (u.maximize) g = -g;
      if (u.weight_decay != 0) {
        if (u.decoupled) {
          p *= kept;
        } else {
          g += decay * p;
        }
      }
      V m = load_up_to(first + i, left), v = load_up_to(second + i, left);
      // Exact at either end, as torch.lerp.
      m = u.beta1 > 0.5 ? m + rest1 * (g - m) : g - beta1 * (g - m);
      // Multiplied in the order of torch, whose products stay in range for gradients whose squares do not.
      v = beta2 * v + rest2 * g * g;
      store_up_to(first + i, m, left);
      store_up_to(second + i, v, left);
      if (most) {
        const V before = load_up_to(most + i, left);
        v = v < before ? before : v;  // a NaN of either stays
        v = before == before ? v : before;
        store_up_to(most + i, v, left);
      }
      store_up_to(parameter + i, p - step_size * m / (M::sqrt(v) / root + eps), left);
    }
  }
};

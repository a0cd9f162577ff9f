// How optimizers move parameters, on runs of elements. Included by kernels.inl inside an ISA's namespace and target
// region, after storage.inl; must not include anything. The order of operations is that of torch.optim, so that
// overflow and the last bits are torch's.

// Elements [begin, end) of a parameter, by the formulas of torch.optim. What is stored is rounded; what is used again
// in the same step is not.
template <class S> struct Step {
  using M = Arithmetic<S>;
  using V = typename M::V;
  static constexpr int lanes = M::lanes;

  static void move(Sgd, const Update& update, int64_t begin, int64_t end) {
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

  // kept * x + (1 - kept) * y, in the form of torch.lerp, which is exact at the end that is nearer.
  static V between(V x, V y, double kept) {
    const double rest = 1 - kept;
    return rest < 0.5 && rest > -0.5 ? x + M::fill(rest) * (y - x) : y - M::fill(kept) * (y - x);
  }

  static void move(Adam, const Update& update, int64_t begin, int64_t end) {
    const UpdateSpec u = update.spec;
    S* const parameter = static_cast<S*>(update.parameter);
    const S* const grad = static_cast<const S*>(update.grad);
    S* const first = static_cast<S*>(update.state[0]);
    S* const second = static_cast<S*>(update.state[1]);
    S* const most = static_cast<S*>(update.state[2]);
    const V decay = M::fill(u.weight_decay), kept = M::fill(1 - u.lr * u.weight_decay), beta2 = M::fill(u.beta2),
            rest2 = M::fill(1 - u.beta2), eps = M::fill(u.eps), root = M::fill(u.root),
            step_size = M::fill(u.step_size);
    for (int64_t i = begin; i < end; i += lanes) {
      const int64_t left = end - i;
      V p = load_up_to(parameter + i, left), g = load_up_to(grad + i, left);
      if (u.maximize) g = -g;
      if (u.weight_decay != 0) {
        if (u.decoupled_weight_decay) {
          p *= kept;
        } else {
          g += decay * p;
        }
      }
      V m = load_up_to(first + i, left), v = load_up_to(second + i, left);
      m = between(m, g, u.beta1);
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

  static void move(RmsProp, const Update& update, int64_t begin, int64_t end) {
    const UpdateSpec u = update.spec;
    S* const parameter = static_cast<S*>(update.parameter);
    const S* const grad = static_cast<const S*>(update.grad);
    S* const square = static_cast<S*>(update.state[0]);
    S* const buffer = static_cast<S*>(update.state[1]);
    S* const mean = static_cast<S*>(update.state[2]);
    const V lr = M::fill(u.lr), decay = M::fill(u.weight_decay), momentum = M::fill(u.momentum),
            alpha = M::fill(u.alpha), rest = M::fill(1 - u.alpha), eps = M::fill(u.eps),
            infinity = M::fill(__builtin_inf());
    for (int64_t i = begin; i < end; i += lanes) {
      const int64_t left = end - i;
      V p = load_up_to(parameter + i, left), g = load_up_to(grad + i, left);
      if (u.maximize) g = -g;
      if (u.weight_decay != 0) g += decay * p;
      V v = load_up_to(square + i, left);
      v = alpha * v + rest * g * g;
      store_up_to(square + i, v, left);
      if (mean) {
        const V m = between(load_up_to(mean + i, left), g, u.alpha);
        store_up_to(mean + i, m, left);
        // Torch's kernel multiplies and subtracts in one instruction, which does not overflow in between: an infinite
        // v stays infinite while m is finite. Else the result is minus infinity, whose root is NaN. The comparison of
        // the product keeps the two operations apart, so that equal numbers leave zero and not a rounding error.
        const V taken = m * m;
        const V at_overflow = v < infinity ? -taken : (M::abs(m) < infinity ? v : -taken);
        v = taken < infinity ? v - taken : at_overflow;
      }
      const V root = M::sqrt(v) + eps;
      if (buffer) {
        const V b = momentum * load_up_to(buffer + i, left) + g / root;
        store_up_to(buffer + i, b, left);
        p -= lr * b;
      } else {
        p -= lr * g / root;
      }
      store_up_to(parameter + i, p, left);
    }
  }

  template <class R> static void by(const Update& update, int64_t begin, int64_t end) { move(R{}, update, begin, end); }

  template <class List> struct Table;
  template <class... R> struct Table<RuleList<R...>> {
    static constexpr UpdateKernel rows[] = {&by<R>...};
  };
};

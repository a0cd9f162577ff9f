// Elementwise instructions and the reductions at their ends, on runs of elements. Included by kernels.inl inside an
// ISA's namespace and target region, after storage.inl; must not include anything. The bodies are those of
// element_operations.h, activation.h and loss.h.

// The bodies of activations and losses in the form of element_operations.h.
template <class A> struct ValueOf : OperationOf<1> {
  template <class M> static auto value(const Operands<M>& x, Scalars p) { return A::template value<M>(x.a, p); }
};
template <class A> struct GradientOf : OperationOf<2> {
  template <class M> static auto value(const Operands<M>& x, Scalars p) { return A::template gradient<M>(x.a, x.b, p); }
};
template <class L> struct LossOf : OperationOf<2> {
  template <class M> static auto value(const Operands<M>& x, Scalars p) {
    return L::template value<M>(x.a, x.b, M::fill(1), p);
  }
};

template <class S> struct RoundTo : OperationOf<1> {
  template <class M> static auto value(const Operands<M>& x, Scalars) { return Storage16<S>::nearest(S{}, x.a); }
};

template <class T> struct Elements {
  using M = Math<T>;
  using V = typename M::V;
  static constexpr int lanes = M::lanes;

  template <class O> static void run(int64_t n, const T* a, const T* b, const T* c, T* out, bool padded, Scalars p) {
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
      Operands<M> x;
      if constexpr (O::operands > 0) x.a = M::load(a + i);
      if constexpr (O::operands > 1) x.b = M::load(b + i);
      if constexpr (O::operands > 2) x.c = M::load(c + i);
      M::store(out + i, O::template value<M>(x, p));
    }
    if (i == n) return;
    Operands<M> x;
    if constexpr (O::operands > 0) x.a = M::load_first(a + i, n - i);
    if constexpr (O::operands > 1) x.b = M::load_first(b + i, n - i);
    if constexpr (O::operands > 2) x.c = M::load_first(c + i, n - i);
    const V v = O::template value<M>(x, p);
    padded ? M::store(out + i, v) : M::store_first(out + i, v, n - i);
  }

  // Numbers of 16 bits are computed in float32.
  template <class S> static constexpr ElementKernel<T> rounding() {
    if constexpr (sizeof(T) == sizeof(float)) return &run<RoundTo<S>>;
    return nullptr;
  }

  template <class Operations, class Others> struct Table;
  template <class... O, class... A> struct Table<OperationList<O...>, ActivationList<A...>> {
    static constexpr ElementKernel<T> rows[] = {
        &run<O>...,           &run<ValueOf<A>>..., &run<GradientOf<A>>..., &run<LossOf<BinaryCrossEntropy>>,
        rounding<BFloat16>(), rounding<Float16>()};
  };

  // How two partial results become one, and where they begin. NaN stays.
  struct Sum {
    static constexpr double start = 0;
    template <class X> static X fold(X a, X b) { return a + b; }
  };
  struct Max {
    static constexpr double start = -__builtin_inf();
    template <class X> static X fold(X a, X b) { return (b > a) | (b != b) ? b : a; }
  };
  struct Min {
    static constexpr double start = __builtin_inf();
    template <class X> static X fold(X a, X b) { return (b < a) | (b != b) ? b : a; }
  };

  template <class R> static double fold_row(int64_t n, const T* x) {
    constexpr int chains = 4;
    V part[chains];
#pragma GCC unroll 4
    for (int k = 0; k < chains; k++) part[k] = M::fill(R::start);
    int64_t i = 0;
    for (; i + chains * lanes <= n; i += chains * lanes) {
#pragma GCC unroll 4
      for (int k = 0; k < chains; k++) part[k] = R::fold(part[k], M::load(x + i + k * lanes));
    }
    for (; i + lanes <= n; i += lanes) part[0] = R::fold(part[0], M::load(x + i));
    // Less than a vector goes one by one, while the processor is at other rows too.
    double rest = R::start;
    for (; i < n; i++) rest = R::fold(rest, double(x[i]));
    if (n < lanes) return rest;
    T some[lanes];
    M::store(some, R::fold(R::fold(part[0], part[1]), R::fold(part[2], part[3])));
    double all[lanes];
    for (int l = 0; l < lanes; l++) all[l] = double(some[l]);
#pragma GCC unroll 4
    for (int half = lanes / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; l++) all[l] = R::fold(all[l], all[l + half]);
    }
    return R::fold(all[0], rest);
  }

  template <class R> static void fold_rows(int64_t rows, int64_t columns, const T* x, double* into) {
    for (int64_t i = 0; i < rows; i++) into[i] = R::fold(into[i], fold_row<R>(columns, x + i * columns));
  }

  // As many rows are added one after another as in Leaf.
  static constexpr int chain = 32;

  template <class R> static void fold_columns(int64_t rows, int64_t columns, const T* x, double* into) {
    for (int64_t j = 0; j < columns; j += lanes) {
      const int64_t left = columns - j;
      V total = M::fill(R::start);
      for (int64_t from = 0; from < rows; from += chain) {
        V part = load_up_to(x + from * columns + j, left);
        for (int64_t i = from + 1; i < from + chain && i < rows; i++)
          part = R::fold(part, load_up_to(x + i * columns + j, left));
        total = R::fold(total, part);
      }
      if (left >= lanes) {
        fold_into<R>(total, into + j);
        continue;
      }
      T some[lanes];
      M::store(some, total);
      for (int64_t l = 0; l < left; l++) into[j + l] = R::fold(into[j + l], double(some[l]));
    }
  }

  // Adds a vector to as many partial results.
  template <class R> static void fold_into(V v, double* into) {
    using Double = Math<double>;
    typedef T Part __attribute__((vector_size(Double::lanes * sizeof(T))));
    Part parts[lanes / Double::lanes];
    __builtin_memcpy(parts, &v, sizeof v);
#pragma GCC unroll 2
    for (int k = 0; k < lanes / Double::lanes; k++) {
      double* const place = into + k * Double::lanes;
      const auto wide = __builtin_convertvector(parts[k], typename Double::V);
      Double::store(place, R::fold(Double::load(place), wide));
    }
  }

  static constexpr ElementFolds<T> folds[] = {
      {Sum::start, &fold_rows<Sum>, &fold_columns<Sum>},
      {Max::start, &fold_rows<Max>, &fold_columns<Max>},
      {Min::start, &fold_rows<Min>, &fold_columns<Min>},
  };
};

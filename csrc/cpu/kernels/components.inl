// Values and derivatives on their way through an activation, forward and backward. Included by kernels.inl inside an
// ISA's namespace and target region, after storage.inl; must not include anything. The formulas are those of
// contract/derivatives.h, and for backward what differentiating them gives.

template <class S> struct Jets {
  using M = Math<S>;
  using V = typename M::V;
  static constexpr int lanes = M::lanes;

  // One vector of each component.
  struct Row {
    int64_t step, left;
    V load(const S* p, int c) const { return load_up_to(p + c * step, left); }
    void store(S* p, int c, V v) const { store_up_to(p + c * step, v, left); }
  };

  // The sum of z_i z_j over pairs [from, end).
  static V products(const Row& row, const S* z, const AxisPair* pairs, int from, int end) {
    V sum = {};
    for (int i = from; i < end; i++) sum += row.load(z, 1 + pairs[i].first) * row.load(z, 1 + pairs[i].second);
    return sum;
  }

  // Sums are written first, since the output may lie where z_i are read for them.
  static void write(const Components<S>& c, const Row& row, const S* z, S* h, V value, V first, V second) {
    for (int s = 0, pair = 0; s < c.seconds; s++) {
      const V sum = products(row, z, c.pairs, pair, c.pairs_end[s]);
      const int at = 1 + c.firsts + s;
      row.store(h, at, second * sum + first * row.load(z, at));
      pair = c.pairs_end[s];
    }
    for (int i = 1; i <= c.firsts; i++) row.store(h, i, first * row.load(z, i));
    row.store(h, 0, value);
  }

  template <class A> static void forward(const Components<S>& arguments) {
    const Components<S> c = arguments;  // stores through output cannot change a copy
    for (int64_t j = 0; j < c.n; j += lanes) {
      const Row row{c.step, c.n - j};
      const Taylor<M> f = A::template expand<M>(row.load(c.pre + j, 0), c.scalars);
      write(c, row, c.pre + j, c.output + j, f.value, f.first, f.second);
    }
  }

  template <class A> static void backward(const Components<S>& arguments) {
    const Components<S> c = arguments;
    for (int64_t j = 0; j < c.n; j += lanes) {
      const Row row{c.step, c.n - j};
      const S* const z = c.pre + j;
      S* const g = c.grad + j;
      const Taylor<M> f = A::template expand<M>(row.load(z, 0), c.scalars);
      write(c, row, z, c.output + j, f.value, f.first, f.second);
      // What the second and the third derivative are multiplied by in the gradient of the value.
      V by_second = {}, by_third = {};
      for (int i = 1; i <= c.firsts; i++) {
        const V grad = row.load(g, i);
        by_second += grad * row.load(z, i);
        row.store(g, i, f.first * grad);
      }
      for (int s = 0, pair = 0; s < c.seconds; s++) {
        const int at = 1 + c.firsts + s, end = c.pairs_end[s];
        const V grad = row.load(g, at), scaled = f.second * grad;
        by_second += grad * row.load(z, at);
        by_third += grad * products(row, z, c.pairs, pair, end);
        for (; pair < end; pair++) {
          const int one = 1 + c.pairs[pair].first, other = 1 + c.pairs[pair].second;
          if (one == other) {
            row.store(g, one, row.load(g, one) + (scaled + scaled) * row.load(z, one));
            continue;
          }
          row.store(g, one, row.load(g, one) + scaled * row.load(z, other));
          row.store(g, other, row.load(g, other) + scaled * row.load(z, one));
        }
        row.store(g, at, f.first * grad);
      }
      row.store(g, 0, f.first * row.load(g, 0) + (f.second * by_second + f.third * by_third));
    }
  }

  template <class List> struct Table;
  template <class... A> struct Table<ActivationList<A...>> {
    static constexpr ComponentKernels<S> rows[] = {{&forward<A>, &backward<A>}...};
  };
};

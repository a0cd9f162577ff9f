// What clipping does with a run of a gradient's elements. Included by kernels.inl inside an ISA's namespace and target
// region, after elements.inl; must not include anything.

template <class S> struct Clip {
  using C = Compute<S>;
  using M = Arithmetic<S>;
  using V = typename M::V;
  using D = typename Math<double>::V;
  using Max = typename Elements<C>::Max;
  static constexpr int lanes = M::lanes;
  // Sums that grow side by side, because an addition takes some cycles, and how many vectors make one term of each.
  static constexpr int chains = 4;
  static constexpr int wide = int(sizeof(double) / sizeof(C));  // vectors of float64 that hold the lanes of a V
  static constexpr int vectors = chains / wide;

  // In float64, where squares of the narrower dtypes neither overflow nor vanish.
  static void add_squares(V x, D* sums) {
    if constexpr (wide == 1) {
      sums[0] += x * x;
    } else {
      typedef C Half __attribute__((vector_size(Isa::vector_bytes / 2)));
      Half halves[2];
      __builtin_memcpy(halves, &x, sizeof x);
      const D low = __builtin_convertvector(halves[0], D), high = __builtin_convertvector(halves[1], D);
      sums[0] += low * low;
      sums[1] += high * high;
    }
  }

  // The sum of the squares. Errors grow with the longest chain of additions, which is therefore cut.
  static double squares(int64_t n, const S* x) {
    constexpr int64_t group = vectors * lanes, run = 32 * group;
    D total[chains] = {};
    for (int64_t from = 0; from < n; from += run) {
      const int64_t end = n - from < run ? n : from + run;
      D part[chains] = {};
      int64_t i = from;
      for (; i + group <= end; i += group) {
#pragma GCC unroll 4
        for (int k = 0; k < vectors; k++) add_squares(Storage<S>::load(x + i + k * lanes), part + k * wide);
      }
      for (; i < end; i += lanes) add_squares(load_up_to(x + i, end - i), part);
#pragma GCC unroll 4
      for (int k = 0; k < chains; k++) total[k] += part[k];
    }
    const D sum = (total[0] + total[1]) + (total[2] + total[3]);
    double all = 0;
    for (int l = 0; l < Math<double>::lanes; l++) all += sum[l];
    return all;
  }

  // The largest magnitude; NaN if there is one.
  static double largest(int64_t n, const S* x) {
    constexpr int64_t group = chains * lanes;
    V most[chains] = {};
    int64_t i = 0;
    for (; i + group <= n; i += group) {
#pragma GCC unroll 4
      for (int k = 0; k < chains; k++) most[k] = Max::fold(most[k], M::abs(Storage<S>::load(x + i + k * lanes)));
    }
    for (; i < n; i += lanes) most[0] = Max::fold(most[0], M::abs(load_up_to(x + i, n - i)));
    const V joined = Max::fold(Max::fold(most[0], most[1]), Max::fold(most[2], most[3]));
    double all = 0;
    for (int l = 0; l < lanes; l++) all = Max::fold(all, double(joined[l]));
    return all;
  }

  static void scale(int64_t n, S* x, double factor) {
    const V by = M::fill(factor);
    for (int64_t i = 0; i < n; i += lanes) store_up_to(x + i, load_up_to(x + i, n - i) * by, n - i);
  }

  // The lower limit first, as in torch, where a negative limit makes a difference. NaN stays.
  static void clamp(int64_t n, S* x, double limit) {
    const V low = M::fill(-limit), high = M::fill(limit);
    for (int64_t i = 0; i < n; i += lanes) {
      V v = load_up_to(x + i, n - i);
      v = v < low ? low : v;
      v = v > high ? high : v;
      store_up_to(x + i, v, n - i);
    }
  }

  static constexpr ClipKernels<S> kernels = {&squares, &largest, &scale, &clamp};
};

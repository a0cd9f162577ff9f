// How elements of a dtype are loaded and stored as vectors of the type that is computed in (Storage), and how they are
// multiplied (Factors). Included by kernels.inl after math.inl, inside an ISA's namespace and target region; must not
// include anything. An ISA provides masked loads and stores, the conversions of float16, and, where it has one, an
// instruction that multiplies pairs of elements.

template <class S> struct Storage {
  using M = Math<S>;
  using V = typename M::V;
  static V load(const S* p) { return M::load(p); }
  // The first n lanes, n < lanes; zero after. Memory of the others is not touched.
  static V load_first(const S* p, int64_t n) { return M::load_first(p, n); }
  static void store(S* p, V v) { M::store(p, v); }
  static void store_first(S* p, V v, int64_t n) { M::store_first(p, v, n); }
};

// Sixteen bits in memory, float32 in registers; rounded to the nearest, ties to even.
template <class S> struct Storage16 {
  using M = Math<float>;
  using V = M::V;
  using I = M::I;
  typedef uint16_t H __attribute__((vector_size(Isa::vector_bytes / 2)));

  static H load_bits(const S* p) {
    H h;
    __builtin_memcpy(&h, p, sizeof h);
    return h;
  }
  static H load_first_bits(const S* p, int64_t n) { return H(Isa::load_first(&p->bits, n)); }

  static V widen(BFloat16, H h) { return V(__builtin_convertvector(h, I) << 16); }
  static V widen(Float16, H h) { return V(Isa::widen_float16(h)); }
  static H narrow(BFloat16, V v) { return rounded<typename Isa::template Pairs<BFloat16>>(v); }
  static H narrow(Float16, V v) { return H(Isa::narrow_float16(v)); }
  // Rounds by an instruction, if the ISA multiplies pairs, and in integers otherwise.
  template <class Pairs> static H rounded(V v) {
    if constexpr (__is_class(Pairs)) {
      return H(Pairs::narrow(v));
    } else {
      return __builtin_convertvector(nearest_bits(v) >> 16, H);
    }
  }
  // Those of the nearest bfloat16 are the upper ones.
  static I nearest_bits(V v) {
    const I bits = I(v);
    const I nearest = bits + 0x7fffu + (bits >> 16 & 1u);
    const I quiet_nan = bits | 0x400000u;
    return v == v ? nearest : quiet_nan;
  }

  // The nearest number of 16 bits, in float32.
  static V nearest(BFloat16, V v) { return V(nearest_bits(v) & 0xffff0000u); }
  static V nearest(Float16, V v) { return widen(Float16{}, narrow(Float16{}, v)); }

  static V load(const S* p) { return widen(S{}, load_bits(p)); }
  static V load_first(const S* p, int64_t n) { return widen(S{}, load_first_bits(p, n)); }
  static void store(S* p, V v) {
    const H h = narrow(S{}, v);
    __builtin_memcpy(p, &h, sizeof h);
  }
  static void store_first(S* p, V v, int64_t n) { Isa::store_first(&p->bits, narrow(S{}, v), n); }
};
template <> struct Storage<BFloat16> : Storage16<BFloat16> {};
template <> struct Storage<Float16> : Storage16<Float16> {};

// The operand type of activation.h for tensors of S.
template <class S> using Arithmetic = Math<Compute<S>>;

template <class S> typename Storage<S>::V load_up_to(const S* p, int64_t n) {
  return n < Math<Compute<S>>::lanes ? Storage<S>::load_first(p, n) : Storage<S>::load(p);
}
template <class S> void store_up_to(S* p, typename Storage<S>::V v, int64_t n) {
  n < Math<Compute<S>>::lanes ? Storage<S>::store_first(p, v, n) : Storage<S>::store(p, v);
}

// Isa::Pairs<S> is the instruction that multiplies pairs of S, or void where there is none.
template <class S, class Pairs = typename Isa::template Pairs<S>> struct Factors;

// One element of k in each lane, converted once, when it is packed.
template <class S> struct Factors<S, void> {
  using C = Compute<S>;
  using M = Math<C>;
  using V = typename M::V;
  static constexpr int k_unit = 1;  // elements of k in one lane
  // Lanes are successive units of k; `left` elements of k remain.
  static V load_along_k(const S* p, int64_t left) { return load_up_to(p, left); }
  // Lanes are successive rows or columns, of which n remain.
  static V load_across_k(const S* p, int64_t, int64_t, int64_t n) { return load_up_to(p, n); }
  // Two vectors side by side, the second one not empty.
  static void load_two_across_k(const S* p, int64_t, int64_t, int64_t n, V& first, V& second) {
    first = Storage<S>::load(p);
    second = load_up_to(p + M::lanes, n - M::lanes);
  }
  static V broadcast(const C* p) { return M::broadcast(*p); }
  static V multiply_add(V sum, V x, V y) { return sum + x * y; }
  static V ones() { return M::fill(1); }
};

// Two successive elements of k as they are stored, side by side in one lane of 32 bits; an odd k ends with a zero. The
// instruction takes subnormal numbers for zero.
template <class S, class Pairs> struct Factors {
  using C = float;
  using M = Math<float>;
  using V = M::V;
  using I = M::I;
  static constexpr int k_unit = 2;
  static V load_along_k(const S* p, int64_t left) {
    if (left < 2 * M::lanes) return V(Pairs::load_first(&p->bits, left));
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static V load_across_k(const S* p, int64_t k_stride, int64_t k_left, int64_t n) {
    const I even = bits_up_to(p, n);
    return V(k_left > 1 ? even | bits_up_to(p + k_stride, n) << 16 : even);
  }
  static void load_two_across_k(const S* p, int64_t k_stride, int64_t k_left, int64_t n, V& first, V& second) {
    if (n < 2 * M::lanes || k_left == 1) {
      first = load_across_k(p, k_stride, k_left, n);
      second = load_across_k(p + M::lanes, k_stride, k_left, n - M::lanes);
      return;
    }
    Row even, odd;
    __builtin_memcpy(&even, p, sizeof even);
    __builtin_memcpy(&odd, p + k_stride, sizeof odd);
    interleave(even, odd, first, second, typename M::template Counting<2 * M::lanes>::Type{});
  }
  static V broadcast(const float* p) {
    uint32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return V(pair | I{});
  }
  static V multiply_add(V sum, V x, V y) { return V(Pairs::add(sum, x, y)); }
  static V ones() { return V(Pairs::one * 0x10001u | I{}); }

 private:
  typedef uint16_t Row __attribute__((vector_size(Isa::vector_bytes)));
  template <int... l>
  static void interleave(Row even, Row odd, V& first, V& second, typename M::template Indices<l...>) {
    constexpr int count = 2 * M::lanes;
    first = V(__builtin_shufflevector(even, odd, (l / 2 + l % 2 * count)...));
    second = V(__builtin_shufflevector(even, odd, (count / 2 + l / 2 + l % 2 * count)...));
  }
  static I bits_up_to(const S* p, int64_t n) {
    const auto bits = n < M::lanes ? Storage<S>::load_first_bits(p, n) : Storage<S>::load_bits(p);
    return __builtin_convertvector(bits, I);
  }
};

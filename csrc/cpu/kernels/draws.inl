// Random numbers of the Mersenne Twister, in vectors, what is drawn from them, and dropout by what was drawn. Included
// by kernels.inl inside an ISA's namespace and target region, after math.inl; must not include anything.

template <class S> struct Draw {
  using Words = Math<float>::I;
  using Pairs = Math<double>::I;
  static constexpr int words = Math<float>::lanes;
  static constexpr int pairs = Math<double>::lanes;
  static constexpr int size = Twister::size;
  static_assert(size % words == 0);
  typedef int64_t Signed __attribute__((vector_size(Isa::vector_bytes)));
  typedef uint32_t Halves __attribute__((vector_size(Isa::vector_bytes / 2)));

  static Words load(const uint32_t* p) {
    Words v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }

  // The block of words after the one at x, behind it: word i + 624 follows from words i, i + 1 and i + 397, which have
  // all been made when it is its vector's turn.
  static void twist(uint32_t* x) {
    for (int i = 0; i < size; i += words) {
      const Words first = load(x + i), second = load(x + i + 1);
      const Words mixed = (first & 0x80000000u) | (second & 0x7fffffffu);
      const Words next = load(x + i + 397) ^ (mixed >> 1) ^ (-(second & 1u) & 0x9908b0dfu);
      __builtin_memcpy(x + i + size, &next, sizeof next);
    }
  }

  static Words temper(Words y) {
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
  }

  // All bits of a lane if its 64 bits of the generator, cut to 53, are below the threshold.
  static Signed are_below(const uint32_t* x, int64_t threshold) {
    const Pairs v = Pairs(temper(load(x)));
    // The word that was drawn first lies below.
    return Signed((v << 32 | v >> 32) & ((uint64_t(1) << 53) - 1)) < threshold;
  }

  // As many numbers as a vector has pairs.
  static void store(float* to, Signed is_one) {
    const Halves one = __builtin_convertvector(is_one, Halves) & __builtin_bit_cast(uint32_t, 1.0f);
    __builtin_memcpy(to, &one, sizeof one);
  }
  static void store(double* to, Signed is_one) {
    const Pairs one = Pairs(is_one) & __builtin_bit_cast(uint64_t, 1.0);
    __builtin_memcpy(to, &one, sizeof one);
  }

  static void store(uint8_t* to, Signed is_one) {
    typedef int32_t Words __attribute__((vector_size(4 * pairs)));
    typedef int16_t Shorts __attribute__((vector_size(2 * pairs)));
    typedef int8_t Bytes __attribute__((vector_size(pairs)));
    // Step by step, because GCC converts by a factor of more than 2 lane by lane.
    const Words words = __builtin_convertvector(is_one, Words);
    const Shorts shorts = __builtin_convertvector(words, Shorts);
    const Bytes one = __builtin_convertvector(shorts, Bytes) & int8_t(1);
    __builtin_memcpy(to, &one, sizeof one);
  }

  template <class T> static void bernoulli(Twister& generator, int64_t threshold, int64_t n, T* output) {
    // The block that is drawn from, the next one, and what a last vector reads besides.
    uint32_t x[2 * size + words] = {};
    __builtin_memcpy(x, generator.words, sizeof generator.words);
    int64_t used = generator.used;
    while (n > 0) {
      // A number may be made of the last word of a block and the first one of the next.
      const bool crosses = used + 1 >= size;
      if (crosses) twist(x);
      const int64_t most = ((crosses ? 2 * size : size) - used) / 2, count = n < most ? n : most;
      int64_t i = 0;
      for (; i + pairs <= count; i += pairs) store(output + i, are_below(x + used + 2 * i, threshold));
      if (i < count) {
        T rest[pairs];
        store(rest, are_below(x + used + 2 * i, threshold));
        for (int64_t j = 0; i + j < count && j < pairs; j++) output[i + j] = rest[j];
      }
      n -= count;
      output += count;
      used += 2 * count;
      if (crosses) {
        __builtin_memcpy(x, x + size, sizeof generator.words);
        used -= size;
      }
    }
    __builtin_memcpy(generator.words, x, sizeof generator.words);
    generator.used = int(used);
  }

  // A vector with as many lanes as one of S.
  template <class T> struct Lanes {
    typedef T Vector __attribute__((vector_size(sizeof(T) * Math<S>::lanes)));
  };

  // `by` in the lanes whose byte is 1, zero in those whose byte is 0.
  static typename Math<S>::V factors(const uint8_t* kept, typename Math<S>::I by) {
    typename Lanes<uint8_t>::Vector bytes;
    __builtin_memcpy(&bytes, kept, sizeof bytes);
    const auto shorts = __builtin_convertvector(bytes, typename Lanes<uint16_t>::Vector);
    const auto words = __builtin_convertvector(shorts, typename Lanes<uint32_t>::Vector);
    // A byte of 1 becomes all bits of a lane.
    return typename Math<S>::V(-__builtin_convertvector(words, typename Math<S>::I) & by);
  }

  // A product also where the factor is zero: what is infinite becomes NaN then, as by torch.
  static void drop(int64_t n, const S* x, const uint8_t* kept, double scale, S* out) {
    using M = Math<S>;
    const auto by = typename M::I(M::fill(scale));
    int64_t i = 0;
    for (; i + M::lanes <= n; i += M::lanes) M::store(out + i, M::load(x + i) * factors(kept + i, by));
    if (i == n) return;
    uint8_t last[M::lanes] = {};
    for (int64_t j = i; j < n; j++) last[j - i] = kept[j];
    M::store_first(out + i, M::load_first(x + i, n - i) * factors(last, by), n - i);
  }
};

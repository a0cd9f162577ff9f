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
    typedef uint8_t Bytes __attribute__((vector_size(pairs)));
    const Bytes one = __builtin_convertvector(is_one, Bytes) & uint8_t(1);
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

  // A product also where the factor is zero: what is infinite becomes NaN then, as by torch.
  static void drop(int64_t n, const S* x, const uint8_t* kept, double scale, S* out) {
    using M = Math<S>;
    using Bits = typename M::I;
    typedef uint8_t Bytes __attribute__((vector_size(M::lanes)));
    const Bits by = Bits(M::fill(scale));
    for (int64_t i = 0; i < n; i += M::lanes) {
      uint8_t last[M::lanes] = {};
      const uint8_t* from = kept + i;
      if (n - i < M::lanes) {
        for (int j = 0; j < n - i; j++) last[j] = from[j];
        from = last;
      }
      Bytes bytes;
      __builtin_memcpy(&bytes, from, sizeof bytes);
      // A byte of 1 becomes all bits of a lane.
      const auto factor = typename M::V(-__builtin_convertvector(bytes, Bits) & by);
      store_up_to(out + i, load_up_to(x + i, n - i) * factor, n - i);
    }
  }
};

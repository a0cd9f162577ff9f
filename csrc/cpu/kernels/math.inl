// Vector arithmetic of one ISA: the operand type M of activation.h. Included by kernels.inl inside an ISA's namespace
// and target region, after Isa is defined; must not include anything. Coefficients come from tools/fit_math.py. Largest
// errors seen, in units in the last place of the result (tests/kernels/test_math.py measures them again): exp and
// log 1, expm1 and log1p 2, tanh 3, sigmoid 3, sin 2, cos 3.

template <class T> struct Real;

template <> struct Real<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr Bits bias = 127;
  static constexpr Bits magnitude = 0x7fffffffu;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float exp_low = -104.0f, exp_high = 89.0f;
  // pi in parts short enough that their products with n <= 2^13 are exact without FMA.
  static constexpr float pi[4] = {3.140625f, 0x1.fb8p-11f, -0x1.5ep-22f, 0x1.0b4612p-33f};
  static constexpr float reducible = 25000.0f;
  static constexpr Bits root_half = 0x3f3504f3u;  // of the root of 1/2, rounded
  // What makes subnormal numbers normal, a power of 2.
  static constexpr int up_exponent = 25;
  static constexpr float up = 0x1p25f;
  static constexpr float expm1_tail[] = {0.5f, 0.166665767f, 0.0416665542f, 0.00836323288f, 0.00139262508f};
  static constexpr float atanh_tail[] = {0.333333337f, 0.199998532f, 0.14296179f, 0.108532879f, 0.116121646f};
  static constexpr float sin_tail[] = {-0.166666667f, 0.00833333277f, -0.00019841086f, 2.75364224e-6f, -2.4079237e-8f};
  static constexpr float normal_tail[] = {0.09441064f,     0.170397727f,   0.124379369f,    0.0717071098f,
                                          0.0308633602f,   0.00849611659f, 0.000512078989f, -0.000657920448f,
                                          -0.00018204653f, 7.35653223e-5f};
  static float sin(float x) { return __builtin_sinf(x); }
  static float cos(float x) { return __builtin_cosf(x); }
};

template <> struct Real<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr Bits bias = 1023;
  static constexpr Bits magnitude = 0x7fffffffffffffffu;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 1.9082149292705877e-10;
  static constexpr double exp_low = -746.0, exp_high = 710.0;
  static constexpr double pi[4] = {0x1.921fb58p+1, -0x1.dde974p-26, 0x1.1a62633145c07p-53, 0.0};
  static constexpr double reducible = 2.0e8;
  static constexpr Bits root_half = 0x3fe6a09e667f3bcdu;
  static constexpr int up_exponent = 54;
  static constexpr double up = 0x1p54;
  static constexpr double expm1_tail[] = {0.5,
                                          0.16666666666666671,
                                          0.04166666666666667,
                                          0.0083333333333260831,
                                          0.0013888888888883711,
                                          0.00019841269875002279,
                                          2.4801587325677462e-5,
                                          2.7557255170000887e-6,
                                          2.755727347871858e-7,
                                          2.5105312729622102e-8,
                                          2.0914755325893202e-9};
  static constexpr double atanh_tail[] = {0.33333333333333333,  0.19999999999999761,  0.1428571428580005,
                                          0.11111111099118385,  0.090909099489813572, 0.076922719824302746,
                                          0.066675893157246279, 0.058671395306515987, 0.054225891974400074,
                                          0.037460718977753837, 0.078152889004614252};
  static constexpr double sin_tail[] = {-0.16666666666666667,    0.0083333333333333157, -0.00019841269841254885,
                                        2.7557319219139182e-6,   -2.505210761393476e-8, 1.6058977114074673e-10,
                                        -7.6439639659253567e-13, 2.7313658674940167e-15};
  static constexpr double normal_tail[] = {
      0.094410641301968937,    0.17039772154845543,   0.12437925533926305,     0.071707407337736041,
      0.030864804106340671,    0.0084920954821332594, 0.00050756207455231793,  -0.00063881385185401519,
      -0.00018718426406679651, 4.5554893760753168e-5, 2.8648308433846263e-5,   -4.6315455293707837e-6,
      -4.30340111060603e-6,    8.2932453703119818e-7, 6.6107125396495826e-7,   -2.056895922776015e-7,
      -9.3403523799667994e-8,  5.2144192493934279e-8, 8.5414901769631514e-9,   -1.1064683262182794e-8,
      6.4824040317288806e-10,  1.4436122147749161e-9, -3.2380045819253328e-10, -2.1810003849023284e-11};
  static double sin(double x) { return __builtin_sin(x); }
  static double cos(double x) { return __builtin_cos(x); }
};

template <class T> struct Math {
  using R = Real<T>;
  using Bits = typename R::Bits;
  typedef T V __attribute__((vector_size(Isa::vector_bytes)));
  typedef Bits I __attribute__((vector_size(Isa::vector_bytes)));
  static constexpr int lanes = Isa::vector_bytes / int(sizeof(T));

  // x - 0 is x for every x, -0.0 included; x + 0 is not, and costs an addition.
  static V broadcast(T x) { return x - V{}; }
  // Counting<n>::Type is Indices<0, ..., n - 1>.
  template <int... l> struct Indices {};
  template <int n, int... l> struct Counting : Counting<n - 1, n - 1, l...> {};
  template <int... l> struct Counting<0, l...> {
    using Type = Indices<l...>;
  };

  static V fill(double x) { return broadcast(T(x)); }
  static V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  // The first n lanes, n < lanes; zero after. Memory of the others is not touched.
  static V load_first(const T* p, int64_t n) { return V(Isa::load_first(p, n)); }
  static void store(T* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
  static void store_first(T* p, V v, int64_t n) { Isa::store_first(p, v, n); }

  // rows[i][j] <-> rows[j][i]: at each distance, a power of two, halves of pairs of rows change places.
  static void transpose(V (&rows)[lanes]) { transpose_from<1>(rows, typename Counting<lanes>::Type{}); }

  // Lane i becomes the sum of the lanes of rows[i]: a transposition that adds the halves it makes.
  static V sums(V (&rows)[lanes]) { return sums_from<1>(rows, typename Counting<lanes>::Type{}); }

  static V sqrt(V x) { return V(Isa::sqrt(x)); }
  static V abs(V x) { return V(I(x) & R::magnitude); }

  // e^x. Values below and above the range of T become 0 and infinity.
  static V exp(V x) {
    const V low = fill(R::exp_low), high = fill(R::exp_high);
    x = x < low ? low : x;
    x = x > high ? high : x;
    I n;
    const V p = fill(1) + expm1_reduced(x, n);
    // 2^n in two factors, since n may exceed the exponent range by one bit.
    const I shifted = n - I(fill(R::round)) + offset, half = shifted >> 1, rest = shifted - half;
    return p * power_of_2(half - offset / 2) * power_of_2(rest - (offset - offset / 2));
  }

  // e^x for x <= 0, with the bits of exp: n is at most 0, so that one of the two factors can be a constant.
  static V exp_of_negative(V x) {
    const V low = fill(R::exp_low);
    x = x < low ? low : x;
    I n;
    const V p = fill(1) + expm1_reduced(x, n);
    return p * power_of_2(n + Bits(R::up_exponent)) * fill(1 / R::up);
  }

  // 1 - e^x for x <= 0, and up to 40; 0 for either zero.
  static V one_minus_exp(V x) {
    const V low = fill(-50);
    x = x < low ? low : x;
    I n;
    const V p = expm1_reduced(x, n), s = power_of_2(n);
    return (fill(1) - s) - s * p;
  }

  // e^x - 1 for x <= 0, and up to 40; a zero keeps its sign.
  static V expm1_of_negative(V x) { return x == fill(0) ? x : -one_minus_exp(x); }

  // e^x - 1 for every x. From 40 on it is e^x in both dtypes.
  static V expm1(V x) {
    const V top = fill(40), bounded = x > top ? top : x;
    const V small = expm1_of_negative(bounded);
    return x > top ? exp(x) : small;
  }

  // The natural logarithm: -infinity of 0, NaN of what is negative.
  static V log(V x) {
    const V zero = fill(0);
    const V y = log_of_positive(x);
    const V beyond = x == zero ? fill(-__builtin_inf()) : fill(__builtin_nan(""));
    return x < fill(__builtin_inf()) ? (x > zero ? y : beyond) : x;
  }

  // log(1 + x) for every x: that of the rounded sum, and what the rounding took, by the derivative.
  static V log1p(V x) {
    const V one = fill(1), zero = fill(0);
    const V sum = one + x;
    const V y = log(sum), lost = (x - (sum - one)) / sum;
    const V finite = sum < fill(__builtin_inf()) ? y + lost : y;
    return x == zero ? x : (sum > zero ? finite : y);
  }

  // log(1 + x) for 0 <= x <= 1, as 2 atanh(x / (2 + x)).
  static V log1p_of_unit(V x) {
    const V s = x / (fill(2) + x);
    const V u = s * s;
    return fill(2) * (s + s * u * polynomial(R::atanh_tail, u));
  }

  // log x for finite x >= 1, such as a sum of exponentials of which one is 1; NaN for NaN.
  static V log_of_one_up(V x) {
    const I exponent = (I(x) >> R::mantissa) - R::bias;
    // x = 2^n m with 1 <= m < 2. The exponent's bits below those of 2^mantissa make the sum of both.
    constexpr T unit = T(Bits(1) << R::mantissa);
    const V n = V(exponent | ((R::bias + R::mantissa) << R::mantissa)) - broadcast(unit);
    const V m = V((I(x) & ((Bits(1) << R::mantissa) - 1)) | R::bias << R::mantissa);
    const V log = n * fill(R::ln2_high) + (n * fill(R::ln2_low) + log1p_of_unit(m - fill(1)));
    return x == x ? log : x;
  }

  static V sigmoid(V x) { return fill(1) / (fill(1) + exp(-x)); }

  // d / (2 - d) with d = 1 - e^(-2|x|), and the sign of x.
  static V tanh(V x) {
    const V d = one_minus_exp(fill(-2) * abs(x));
    const V t = d / (fill(2) - d);
    return V(I(t) | (I(x) & ~R::magnitude));
  }

  static V sin(V x) { return sin_shifted(x, fill(0), 0); }
  static V cos(V x) { return sin_shifted(x, fill(0.5), 1); }

  // Q(x) e^(x^2 / 2) for x >= 0, where Q is the upper tail of the normal distribution.
  static V normal_tail(V x) {
    const V t = fill(8) / (fill(4) + x) - fill(1);
    // Far out, where e^(-x^2 / 2) is 0, the polynomial may err below zero, and -0.0 would change the product's sign.
    return abs(polynomial(R::normal_tail, t));
  }

 private:
  template <int distance, int... l> static void transpose_from(V (&rows)[lanes], Indices<l...> all) {
    if constexpr (distance < lanes) {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; i++) {
        if (i & distance) continue;
        const V a = rows[i], b = rows[i + distance];
        rows[i] = __builtin_shufflevector(a, b, (l & distance ? lanes + l - distance : l)...);
        rows[i + distance] = __builtin_shufflevector(a, b, (l & distance ? lanes + l : l + distance)...);
      }
      transpose_from<2 * distance>(rows, all);
    }
  }

  template <int distance, int... l> static V sums_from(V (&rows)[lanes], Indices<l...> all) {
    if constexpr (distance == lanes) {
      return rows[0];
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; i += 2 * distance) {
        const V a = rows[i], b = rows[i + distance];
        rows[i] = __builtin_shufflevector(a, b, (l & distance ? lanes + l - distance : l)...) +
                  __builtin_shufflevector(a, b, (l & distance ? lanes + l : l + distance)...);
      }
      return sums_from<2 * distance>(rows, all);
    }
  }

  // Keeps exponents positive while they are split in two.
  static constexpr Bits offset = 2048;

  template <int N> static V polynomial(const T (&c)[N], V x) {
    if constexpr (N < 16) {
      V p = fill(c[N - 1]);
#pragma GCC unroll 32
      for (int i = N - 2; i >= 0; i--) p = p * x + fill(c[i]);
      return p;
    } else {
      // In two halves, of even and of odd powers, because one long chain of additions would be waited for.
      static_assert(N % 2 == 0);
      const V square = x * x;
      V odd = fill(c[N - 1]), even = fill(c[N - 2]);
#pragma GCC unroll 32
      for (int i = N - 3; i > 0; i -= 2) {
        odd = odd * square + fill(c[i]);
        even = even * square + fill(c[i - 1]);
      }
      return odd * x + even;
    }
  }

  // Of the last bits of n alone, so that it does not matter what is added to n by R::round.
  static V power_of_2(I n) { return V((n + R::bias) << R::mantissa); }

  // x = k ln 2 + r, |r| <= ln 2 / 2; returns e^r - 1. The integer n is k plus the bits of R::round.
  static V expm1_reduced(V x, I& n) {
    const V shifted = x * fill(1.44269504088896340736) + fill(R::round);
    const V k = shifted - fill(R::round);
    n = I(shifted);
    const V r = (x - k * fill(R::ln2_high)) - k * fill(R::ln2_low);
    return r + r * r * polynomial(R::expm1_tail, r);
  }

  // x = 2^k m with m between the root of 1/2 and that of 2, and log m as that of 1 + f: f - f^2 / 2 + s (f^2 / 2 + r),
  // where s = f / (2 + f) and r = 2 s^2 P(s^2). So the last addition makes most of the error.
  static V log_of_positive(V x) {
    constexpr Bits one_bits = R::bias << R::mantissa;
    constexpr Bits fraction = (Bits(1) << R::mantissa) - 1;
    const I subnormal = I(x < V(I{} + (Bits(1) << R::mantissa)));
    const V normal = subnormal ? x * fill(R::up) : x;
    const I bits = I(normal) + (one_bits - R::root_half);
    // The exponent as a number: added to the last bits of a large one.
    const I exponent = (bits >> R::mantissa) - R::bias - (subnormal & Bits(R::up_exponent));
    const V k = V(I(fill(R::round)) + exponent) - fill(R::round);
    const V f = V((bits & fraction) + R::root_half) - fill(1);
    const V half = fill(0.5) * f * f;
    const V s = f / (fill(2) + f);
    const V u = s * s;
    const V r = fill(2) * u * polynomial(R::atanh_tail, u);
    return k * fill(R::ln2_high) - ((half - (s * (half + r) + k * fill(R::ln2_low))) - f);
  }

  // x = (n + shift) pi + r, |r| <= pi / 2: sin x = (-1)^n sin r for shift 0, and
  // cos x = (-1)^(n + 1) sin r for shift 1/2. Lanes too large for the reduction go to libm, each by
  // its own value, so that a lane's bits do not depend on its neighbours.
  static V sin_shifted(V x, V shift, Bits parity) {
    const V quotient = x * fill(0.318309886183790671538) - shift;
    const V shifted = quotient + fill(R::round);
    const V n = (shifted - fill(R::round)) + shift;
    V r = x - n * fill(R::pi[0]);
    r = r - n * fill(R::pi[1]);
    r = r - n * fill(R::pi[2]);
    r = r - n * fill(R::pi[3]);
    const V u = r * r;
    const V s = r + r * u * polynomial(R::sin_tail, u);
    const I sign = (I(shifted) + parity) << (sizeof(T) * 8 - 1);
    V y = V(I(s) ^ sign);
    const I large = I(abs(x) > fill(R::reducible));
    Bits any = 0;
    for (int i = 0; i < lanes; i++) any |= large[i];
    if (any) {
      for (int i = 0; i < lanes; i++) {
        if (large[i]) y[i] = parity ? R::cos(x[i]) : R::sin(x[i]);
      }
    }
    return y;
  }
};

// What the files of AVX-512 share: masked loads and stores, and the conversions of float16. Included
// inside an ISA's namespace and target region; must not include anything.

struct Avx512 {
  static constexpr int vector_bytes = 64;

  static __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1); }
  static __m512 load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static __m512d load_first(const double* p, int64_t n) { return _mm512_maskz_loadu_pd(__mmask8(first(n)), p); }
  static __m256i load_first(const uint16_t* p, int64_t n) { return _mm256_maskz_loadu_epi16(first(n), p); }
  static void store_first(float* p, __m512 v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static void store_first(double* p, __m512d v, int64_t n) { _mm512_mask_storeu_pd(p, __mmask8(first(n)), v); }
  template <class H> static void store_first(uint16_t* p, H v, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), __m256i(v));
  }

  static __m512 sqrt(__m512 v) { return _mm512_maskz_sqrt_ps(__mmask16(-1), v); }
  static __m512d sqrt(__m512d v) { return _mm512_maskz_sqrt_pd(__mmask8(-1), v); }

  // The forms with a mask, though it is full: GCC takes the others to read an uninitialised register.
  template <class H> static __m512 widen_float16(H h) { return _mm512_maskz_cvtph_ps(__mmask16(-1), __m256i(h)); }
  template <class V> static __m256i narrow_float16(V v) {
    return _mm512_maskz_cvtps_ph(__mmask16(-1), __m512(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

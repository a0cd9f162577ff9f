// AVX2 with FMA and F16C, from Haswell and Zen on. Reached through dispatch.cpp only after the
// operating system's support has been checked.
#include "target.h"

#if defined(__x86_64__)
FASTMLP_TARGET("avx2,fma,f16c")
#include "../../contract/activation.h"
#include "../../contract/element_operations.h"

namespace fastmlp::cpu::avx2 {

struct Isa {
  static constexpr const char* name = "avx2";
  static constexpr int vector_bytes = 32;
  template <class S> using Pairs = void;

  static __m256i first(const float*, int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static __m256i first(const double*, int64_t n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static __m256 load_first(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(p, n)); }
  static __m256d load_first(const double* p, int64_t n) { return _mm256_maskload_pd(p, first(p, n)); }
  // In parts, because AMD's processors take a dozen cycles for a store with a mask.
  static void store_first(float* p, __m256 v, int64_t n) {
    __m128 rest = _mm256_castps256_ps128(v);
    if (n & 4) {
      _mm_storeu_ps(p, rest);
      rest = _mm256_extractf128_ps(v, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
      rest = _mm_movehl_ps(rest, rest);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, rest);
  }
  static void store_first(double* p, __m256d v, int64_t n) {
    __m128d rest = _mm256_castpd256_pd128(v);
    if (n & 2) {
      _mm_storeu_pd(p, rest);
      rest = _mm256_extractf128_pd(v, 1);
      p += 2;
    }
    if (n & 1) _mm_store_sd(p, rest);
  }

  // AVX2 has no masks for 16 bits.
  static __m128i load_first(const uint16_t* p, int64_t n) {
    uint16_t all[8] = {};
    for (int64_t i = 0; i < 8 && i < n; i++) all[i] = p[i];
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(all));
  }
  template <class H> static void store_first(uint16_t* p, H v, int64_t n) {
    for (int64_t i = 0; i < n; i++) p[i] = v[i];
  }

  static __m256 sqrt(__m256 v) { return _mm256_sqrt_ps(v); }
  static __m256d sqrt(__m256d v) { return _mm256_sqrt_pd(v); }

  template <class H> static __m256 widen_float16(H h) { return _mm256_cvtph_ps(__m128i(h)); }
  template <class V> static __m128i narrow_float16(V v) {
    return _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT);
  }
};

template <class S> constexpr Tiles tiles_of = tiles_of_avx2<S>;

#include "../kernels/kernels.inl"

constexpr Kernels<float> float32 = Leaf<float>::kernels();
constexpr Kernels<double> float64 = Leaf<double>::kernels();
constexpr Kernels<BFloat16> bfloat16 = Leaf<BFloat16>::kernels();
constexpr Kernels<Float16> float16 = Leaf<Float16>::kernels();

extern const KernelTable table;
constexpr KernelTable table = {Isa::name, "AVX2, FMA and F16C", feature_avx2, &float32, &float64, &bfloat16, &float16,
                               &mark};

}  // namespace fastmlp::cpu::avx2
FASTMLP_TARGET_END
#endif

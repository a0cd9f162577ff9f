// AVX2 with FMA, from Haswell and Zen on: 12 of 16 registers hold the tile. Reached through
// dispatch.cpp only after the operating system's support has been checked.
#include "target.h"

#if defined(__x86_64__)
FASTMLP_TARGET("avx2,fma")
#include "../../activation.h"

namespace fastmlp::cpu::avx2 {

struct Isa {
  static constexpr const char* name = "avx2";
  static constexpr const char* description = "AVX2 and FMA";
  static constexpr unsigned needs = feature_avx2_fma;
  static constexpr int vector_bytes = 32;

  static __m256i first(const float*, int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static __m256i first(const double*, int64_t n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static __m256 load_first(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(p, n)); }
  static __m256d load_first(const double* p, int64_t n) { return _mm256_maskload_pd(p, first(p, n)); }
  static void store_first(float* p, __m256 v, int64_t n) { _mm256_maskstore_ps(p, first(p, n), v); }
  static void store_first(double* p, __m256d v, int64_t n) { _mm256_maskstore_pd(p, first(p, n), v); }
};

template <class T> struct Blocks {
  static constexpr int mr = 6;
  static constexpr int64_t mc = 24 * mr;
  static constexpr int64_t nc = 4096 / int64_t(sizeof(T));
  static constexpr int64_t kc = 1536 / int64_t(sizeof(T));
};

#include "../kernels.inl"

extern const KernelTable table;
constexpr KernelTable table = make_table();

}  // namespace fastmlp::cpu::avx2
FASTMLP_TARGET_END
#endif

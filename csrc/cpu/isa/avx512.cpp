// AVX-512 (F, DQ, BW, VL), from Skylake-X and Zen 4 on: 28 of 32 registers hold the tile. Reached
// through dispatch.cpp only after the operating system's support has been checked.
#include "target.h"

#if defined(__x86_64__)
FASTMLP_TARGET("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#include "../../activation.h"

namespace fastmlp::cpu::avx512 {

struct Isa {
  static constexpr const char* name = "avx512";
  static constexpr const char* description = "AVX-512 F, DQ, BW, VL";
  static constexpr unsigned needs = feature_avx2_fma | feature_avx512;
  static constexpr int vector_bytes = 64;

  static __m512 load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
  static __m512d load_first(const double* p, int64_t n) { return _mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p); }
  static void store_first(float* p, __m512 v, int64_t n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v); }
  static void store_first(double* p, __m512d v, int64_t n) { _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v); }
};

template <class T> struct Blocks {
  static constexpr int mr = 14;
  static constexpr int64_t mc = 12 * mr;
  static constexpr int64_t nc = 4096 / int64_t(sizeof(T));
  static constexpr int64_t kc = 1536 / int64_t(sizeof(T));
};

#include "../kernels.inl"

extern const KernelTable table;
constexpr KernelTable table = make_table();

}  // namespace fastmlp::cpu::avx512
FASTMLP_TARGET_END
#endif

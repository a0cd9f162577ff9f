// AVX-512 with vdpbf16ps, from Cooper Lake and Zen 4 on: bfloat16 is multiplied as it is, two elements of k
// at a time. The other dtypes are avx512's. Reached through dispatch.cpp only after the operating system's
// support has been checked.
#include "target.h"

#if defined(__x86_64__)
FASTMLP_TARGET("avx512bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#include "../../contract/activation.h"
#include "../../contract/element_operations.h"

namespace fastmlp::cpu {

namespace avx512 {
extern const Kernels<float> float32;
extern const Kernels<double> float64;
extern const Kernels<Float16> float16;
}  // namespace avx512

namespace avx512_bf16 {

#include "avx512.inl"

struct Dpbf16 {
  static constexpr uint32_t one = 0x3f80;
  static __m512i load_first(const uint16_t* p, int64_t n) {
    return _mm512_maskz_loadu_epi16(__mmask32((1ull << n) - 1), p);
  }
  // sum + x[1] y[1] + x[0] y[0] in each lane.
  template <class V> static __m512 add(V sum, V x, V y) {
    return _mm512_dpbf16_ps(__m512(sum), __m512bh(x), __m512bh(y));
  }
  template <class V> static __m256bh narrow(V v) { return _mm512_cvtneps_pbh(__m512(v)); }
};

struct Isa : Avx512 {
  static constexpr const char* name = "avx512_bf16";
  template <class S> using Pairs = Dpbf16;
};

template <class S> constexpr Tiles tiles_of = tiles_of_avx512<S>;

#include "../kernels/kernels.inl"

constexpr Kernels<BFloat16> bfloat16 = Leaf<BFloat16>::kernels();

extern const KernelTable table;
constexpr KernelTable table = {Isa::name,
                               "AVX-512 F, DQ, BW, VL, BF16",
                               feature_avx2 | feature_avx512 | feature_avx512_bf16,
                               &avx512::float32,
                               &avx512::float64,
                               &bfloat16,
                               &avx512::float16,
                               &mark};

}  // namespace avx512_bf16
}  // namespace fastmlp::cpu
FASTMLP_TARGET_END
#endif

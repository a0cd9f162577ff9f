// AVX-512 (F, DQ, BW, VL), from Skylake-X and Zen 4 on. Reached through dispatch.cpp only after the
// operating system's support has been checked.
#include "target.h"

#if defined(__x86_64__)
FASTMLP_TARGET("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#include "../../contract/activation.h"
#include "../../contract/element_operations.h"

namespace fastmlp::cpu::avx512 {

#include "avx512.inl"

struct Isa : Avx512 {
  static constexpr const char* name = "avx512";
  template <class S> using Pairs = void;
};

template <class S> constexpr Tiles tiles_of = tiles_of_avx512<S>;

#include "../kernels/kernels.inl"

extern const Kernels<float> float32;
extern const Kernels<double> float64;
extern const Kernels<Float16> float16;
constexpr Kernels<float> float32 = Leaf<float>::kernels();
constexpr Kernels<double> float64 = Leaf<double>::kernels();
constexpr Kernels<Float16> float16 = Leaf<Float16>::kernels();
constexpr Kernels<BFloat16> bfloat16 = Leaf<BFloat16>::kernels();

extern const KernelTable table;
constexpr KernelTable table = {
    Isa::name, "AVX-512 F, DQ, BW, VL", feature_avx2 | feature_avx512, &float32, &float64, &bfloat16, &float16, &mark};

}  // namespace fastmlp::cpu::avx512
FASTMLP_TARGET_END
#endif

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

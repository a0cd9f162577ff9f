// What every x86-64 (SSE2) and every aarch64 (NEON) offers: 128-bit vectors, no target region. The
// table that dispatch.cpp falls back to, and the one that other ISAs are compared with.
#include "target.h"

#include "../../activation.h"

namespace fastmlp::cpu::portable {

struct Isa {
  static constexpr const char* name = "portable";
#if defined(__x86_64__)
  static constexpr const char* description = "SSE2, in every x86-64";
#else
  static constexpr const char* description = "128-bit vectors of the baseline";
#endif
  static constexpr unsigned needs = 0;
  static constexpr int vector_bytes = 16;

  template <class T> struct Vector {
    typedef T V __attribute__((vector_size(vector_bytes)));
  };
  template <class T> static typename Vector<T>::V load_first(const T* p, int64_t n) {
    typename Vector<T>::V v = {};
    for (int64_t i = 0; i < n; i++) v[i] = p[i];
    return v;
  }
  template <class T> static void store_first(T* p, typename Vector<T>::V v, int64_t n) {
    for (int64_t i = 0; i < n; i++) p[i] = v[i];
  }
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

}  // namespace fastmlp::cpu::portable

// What every x86-64 (SSE2) and every aarch64 (NEON) offers: 128-bit vectors, no target region. The
// table that dispatch.cpp falls back to, and the one that other ISAs are compared with.
#include "target.h"

#include "../../contract/activation.h"
#include "../../contract/element_operations.h"

namespace fastmlp::cpu::portable {

struct Isa {
  static constexpr const char* name = "portable";
  static constexpr int vector_bytes = 16;
  template <class S> using Pairs = void;

  typedef float Floats __attribute__((vector_size(vector_bytes)));
  typedef double Doubles __attribute__((vector_size(vector_bytes)));
  typedef uint32_t Bits __attribute__((vector_size(vector_bytes)));
  typedef uint16_t Halves __attribute__((vector_size(vector_bytes / 2)));

  static Floats load_first(const float* p, int64_t n) { return load_first_of<Floats>(p, n); }
  static Doubles load_first(const double* p, int64_t n) { return load_first_of<Doubles>(p, n); }
  static Halves load_first(const uint16_t* p, int64_t n) { return load_first_of<Halves>(p, n); }
  template <class T, class V> static void store_first(T* p, V v, int64_t n) {
    for (int64_t i = 0; i < n; i++) p[i] = v[i];
  }

  static float sqrt(float x) { return __builtin_sqrtf(x); }
  static double sqrt(double x) { return __builtin_sqrt(x); }
  template <class V> static V sqrt(V v) {
    for (size_t i = 0; i < sizeof v / sizeof v[0]; i++) v[i] = sqrt(v[i]);
    return v;
  }

  // Exponents 1 to 30 move by 112, the difference of the biases, as subnormals do when they are multiplied.
  static Floats widen_float16(Halves h) {
    const Bits bits = __builtin_convertvector(h, Bits);
    const Bits magnitude = bits & 0x7fffu;
    const Floats scaled = Floats(magnitude << 13) * 0x1p112f;
    const Bits special = (magnitude << 13) | 0x7f800000u;
    return Floats((magnitude >= 0x7c00u ? special : Bits(scaled)) | (bits & 0x8000u) << 16);
  }

  // To the nearest, ties to even.
  static Halves narrow_float16(Floats v) {
    const Bits bits = Bits(v);
    const Bits magnitude = bits & 0x7fffffffu;
    const Bits normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
    // Added to 1/2, a number below 2^-14 is rounded to a multiple of 2^-24, the smallest subnormal.
    const Bits subnormal = Bits(Floats(magnitude) + 0.5f) - 0x3f000000u;
    const Bits infinite = (magnitude & 0u) + 0x7c00u;
    const Bits nan = infinite | 0x200u | (magnitude >> 13 & 0x3ffu);
    Bits half = magnitude < 113u << 23 ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? infinite : half;  // 65520 and more
    half = magnitude > 0x7f800000u ? nan : half;
    return __builtin_convertvector(half | (bits >> 16 & 0x8000u), Halves);
  }

 private:
  template <class V, class T> static V load_first_of(const T* p, int64_t n) {
    V v = {};
    for (int64_t i = 0; i < int64_t(sizeof v / sizeof *p) && i < n; i++) v[i] = p[i];
    return v;
  }
};

template <class S> constexpr Tiles tiles_of = tiles_of_portable<S>;

#include "../kernels/kernels.inl"

constexpr Kernels<float> float32 = Leaf<float>::kernels();
constexpr Kernels<double> float64 = Leaf<double>::kernels();
constexpr Kernels<BFloat16> bfloat16 = Leaf<BFloat16>::kernels();
constexpr Kernels<Float16> float16 = Leaf<Float16>::kernels();

#if defined(__x86_64__)
constexpr const char* description = "SSE2, in every x86-64";
#else
constexpr const char* description = "128-bit vectors of the baseline";
#endif

extern const KernelTable table;
constexpr KernelTable table = {Isa::name, description, 0, &float32, &float64, &bfloat16, &float16, &mark};

}  // namespace fastmlp::cpu::portable

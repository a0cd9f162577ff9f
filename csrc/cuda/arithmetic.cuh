// Arithmetic on single elements in device code: what activation.h computes with (its parameter M), the choice of an
// activation at run time, and vectors of elements in memory. Included by all kernels; knows no tiles and no layers.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../contract/activation.h"
#include "device.h"
#include "product.h"

namespace fastmlp::cuda {

template <class C> struct ScalarMath {
  using V = C;
  static __device__ V fill(double x) { return C(x); }
  static __device__ V exp(V x) { return std::exp(x); }
  static __device__ V exp_of_negative(V x) { return exp(x); }
  static __device__ V expm1_of_negative(V x) { return std::expm1(x); }
  static __device__ V abs(V x) { return std::abs(x); }
  static __device__ V log1p_of_unit(V x) { return std::log1p(x); }
  static __device__ V sigmoid(V x) { return 1 / (1 + std::exp(-x)); }
  static __device__ V tanh(V x) { return std::tanh(x); }
  static __device__ V sin(V x) { return std::sin(x); }
  static __device__ V cos(V x) { return std::cos(x); }
  // Q(x) e^(x^2 / 2) for x >= 0, where Q is the upper tail of the normal distribution.
  static __device__ V normal_tail(V x) { return C(0.5) * scaled_complement(x * C(0.70710678118654752440)); }

 private:
  static __device__ float scaled_complement(float x) { return erfcxf(x); }
  static __device__ double scaled_complement(double x) { return erfcx(x); }
};

// Calls f(A{}) for the activation A of that kind.
template <class F, class... A> __device__ void with_activation(int kind, ActivationList<A...>, const F& f) {
  int number = 0;
  ((number++ == kind ? f(A{}) : void()), ...);
}

// How an operand is read: 16 bytes along k, 16 bytes along its rows (A) or columns (B), or element by element.
enum class Read { along_k, along_rows, elements };

// Elements that are loaded and stored at once, in words of up to 16 bytes.
template <class S, int count> struct alignas(count * sizeof(S) < 16 ? count * sizeof(S) : 16) Vec {
  S element[count];
};

template <class S> constexpr int per_16_bytes = int(16 / sizeof(S));

// Whether the rows of a matrix can be read `count` elements at a time: unit stride, and every row begins aligned.
template <int count, class S> __host__ __device__ __forceinline__ bool has_vectors(const StridedMatrix<S>& x) {
  return x.column_stride == 1 && x.row_stride % count == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % alignof(Vec<S, count>) == 0;
}

// Stores to global memory, 16 bytes at a time. It is not an assignment, because nvcc takes that apart where another
// branch stores single elements.
template <class S, int count> __device__ __forceinline__ void store(S* to, const Vec<S, count>& from) {
  using Word = std::conditional_t<sizeof(from) < 16, uint2, uint4>;
  static_assert(sizeof(from) % sizeof(Word) == 0);
  Word words[sizeof(from) / sizeof(Word)];
  memcpy(words, &from, sizeof(from));
#pragma unroll
  for (unsigned i = 0; i < sizeof(from) / sizeof(Word); i++) __stwb(reinterpret_cast<Word*>(to) + i, words[i]);
}

// Loads elements that lie `stride` apart, of which `valid` exist; the others become zero. If `vectors`, the address is
// aligned, all exist and they lie side by side, so that they are loaded at once. store_run is its counterpart.
template <class S, int count>
__device__ __forceinline__ void load_run(Compute<S> (&to)[count], const S* from, int64_t stride, int valid,
                                         bool vectors) {
  if (vectors) {
    const auto v = *reinterpret_cast<const Vec<S, count>*>(from);
#pragma unroll
    for (int e = 0; e < count; e++) to[e] = widen(v.element[e]);
  } else {
#pragma unroll
    for (int e = 0; e < count; e++) to[e] = e < valid ? widen(from[e * stride]) : Compute<S>(0);
  }
}

template <class S, int count>
__device__ __forceinline__ void store_run(S* to, const Compute<S> (&from)[count], int valid, bool vectors) {
  if (vectors) {
    Vec<S, count> v;
#pragma unroll
    for (int e = 0; e < count; e++) v.element[e] = Narrow<S>::from(from[e]);
    store(to, v);
  } else {
#pragma unroll
    for (int e = 0; e < count; e++) {
      if (e < valid) to[e] = Narrow<S>::from(from[e]);
    }
  }
}

}  // namespace fastmlp::cuda

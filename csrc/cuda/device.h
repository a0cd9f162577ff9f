// The one header that kernels include. Under nvcc it is CUDA, with the few instructions that C++ has no name for as
// inline PTX; under a host compiler, with tests/emulator on the include path, the same kernels run on the CPU, for
// tests. Kernels hold no PTX, and keep three conventions; all else is ordinary CUDA C++:
//   shared<T>()          in place of `__shared__ T x;`: one object for each T of a kernel, aligned to 16 at least, at
//                        most 48 KiB in all
//   dynamic_shared<T>()  in place of `extern __shared__ T x[];`
//   launch(kernel, grid, block, shared_bytes, stream, arguments...)  in place of <<<>>>
// Full warps only: blocks are multiples of 32 threads, and warp functions are for all 32 lanes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../contract/problem.h"

namespace fastmlp::cuda {
// Of an object in shared memory, in bytes: vectors of 16 are read from there, whatever the type's elements are.
template <class T> constexpr size_t shared_alignment = alignof(T) < 16 ? 16 : alignof(T);

// How the tiles of operands come to shared memory: by asynchronous copies, which there are from sm_80 on, or through
// registers.
enum class Staging { asynchronous, registers };

constexpr const char* no_code =
    "this build has no kernels for the GPU's architecture; build fastmlp on this machine, or with the architecture in "
    "TORCH_CUDA_ARCH_LIST";
}  // namespace fastmlp::cuda

#if !defined(__CUDACC__)
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fastmlp::cuda {

// nvcc compiles a kernel for each architecture, with that one's staging in place of the one that is named. The emulator
// has a kernel for each staging, and the architecture is chosen at run time.
constexpr bool compiles_by_architecture = true;
#if __CUDA_ARCH__ >= 800 || !defined(__CUDA_ARCH__)
template <Staging> constexpr Staging staging_of = Staging::asynchronous;
#else
template <Staging> constexpr Staging staging_of = Staging::registers;
#endif

template <class T> __device__ __forceinline__ T& shared() {
  __shared__ alignas(shared_alignment<T>) T object;
  return object;
}

template <class T> __device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

// True for the errors of a binary with neither code for the device nor PTX that its driver can make code of.
inline bool lacks_code(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorUnsupportedPtxVersion;
}

// Returns no_code if this build has no code of the kernel for the current device, else null. Any other error is left to
// the launch, which reports it.
template <class... P> const char* missing_code(void (*kernel)(P...)) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) cudaGetLastError();
  return lacks_code(error) ? no_code : nullptr;
}

// Returns null, or what went wrong.
template <class... P, class... A>
const char* launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, const A&... a) {
  constexpr size_t without_asking = 48 << 10;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > without_asking) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shared_bytes));
  }
  const auto start = [&](P... parameters) {
    void* addresses[] = {&parameters...};
    return cudaLaunchKernel(kernel, grid, block, addresses, shared_bytes, static_cast<cudaStream_t>(stream));
  };
  if (error == cudaSuccess) error = start(P(a)...);
  // CUDA forgets the error, because it is reported here.
  if (error != cudaSuccess) cudaGetLastError();
  if (lacks_code(error)) return no_code;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

__device__ __forceinline__ float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float widen(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

// Rounds to nearest, ties to even; NaN stays NaN.
template <class S> struct Narrow;
template <> struct Narrow<float> {
  static __device__ __forceinline__ float from(float x) { return x; }
};
template <> struct Narrow<double> {
  static __device__ __forceinline__ double from(double x) { return x; }
};
template <> struct Narrow<Float16> {
  static __device__ __forceinline__ Float16 from(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
};
template <> struct Narrow<BFloat16> {
  static __device__ __forceinline__ BFloat16 from(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
};

// Two 16-bit numbers in one word, the first one in the low half. narrow_pair rounds two numbers to a pair;
// narrow_pair_above_zero puts zero in place of negative ones; above_zero_mask has all bits set in the halves whose
// number is positive or NaN.
__device__ __forceinline__ uint32_t bits_of(__half2 pair) {
  return uint32_t(__half_as_ushort(__low2half(pair))) | uint32_t(__half_as_ushort(__high2half(pair))) << 16;
}
__device__ __forceinline__ uint32_t bits_of(__nv_bfloat162 pair) {
  return uint32_t(__bfloat16_as_ushort(__low2bfloat16(pair))) | uint32_t(__bfloat16_as_ushort(__high2bfloat16(pair)))
                                                                    << 16;
}
__device__ __forceinline__ uint32_t narrow_pair(float low, float high, Float16) {
  return bits_of(__floats2half2_rn(low, high));
}
__device__ __forceinline__ uint32_t narrow_pair(float low, float high, BFloat16) {
  return bits_of(__floats2bfloat162_rn(low, high));
}
__device__ __forceinline__ uint32_t narrow_pair_above_zero(float low, float high, Float16) {
#if __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return narrow_pair(low < 0 ? 0 : low, high < 0 ? 0 : high, Float16{});
#endif
}
__device__ __forceinline__ uint32_t narrow_pair_above_zero(float low, float high, BFloat16) {
#if __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return narrow_pair(low < 0 ? 0 : low, high < 0 ? 0 : high, BFloat16{});
#endif
}
__device__ __forceinline__ uint32_t above_zero_mask(uint32_t pair, Float16) {
  const __half2 values = __halves2half2(__ushort_as_half(uint16_t(pair)), __ushort_as_half(uint16_t(pair >> 16)));
  return __hgtu2_mask(values, __floats2half2_rn(0, 0));
}
__device__ __forceinline__ uint32_t above_zero_mask(uint32_t pair, BFloat16) {
#if __CUDA_ARCH__ >= 900
  const __nv_bfloat162 values =
      __halves2bfloat162(__ushort_as_bfloat16(uint16_t(pair)), __ushort_as_bfloat16(uint16_t(pair >> 16)));
  return __hgtu2_mask(values, __floats2bfloat162_rn(0, 0));
#else
  // There are no comparisons of pairs. A half of the difference has its sign bit set where the pair's half is zero, and
  // never borrows from the other; NaN from arithmetic is positive. prmt spreads the signs over their halves, as asm
  // because __byte_perm ignores the bit that asks for that.
  const uint32_t zeros = 0x80008000u - (pair & 0x7fff7fffu);
  uint32_t signs;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(signs) : "r"(zeros | pair));
  return ~signs;
#endif
}

// Reads threadIdx.x anew, so that what is computed from it behind a loop takes no registers in the loop.
__device__ __forceinline__ unsigned read_thread_index() {
  unsigned index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Stores 16 bytes to shared memory by one instruction; nvcc may take an assignment apart.
__device__ __forceinline__ void store_shared16(void* to, const uint4& words) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(to)), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}

// Copies `bytes` (0 to 16) from global to shared memory and fills up to 16 with zeros; both addresses are aligned
// to 16. The thread sees them after the wait for their group, other threads after a barrier behind that wait. Before
// sm_80 the copy goes through registers, and is complete at once.
__device__ __forceinline__ void copy_async16(void* to, const void* from, int bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
#else
  uint4 words = make_uint4(0, 0, 0, 0);
  if (bytes == 16) {
    words = *static_cast<const uint4*>(from);
  } else {
    const auto* halves = static_cast<const uint16_t*>(from);
    uint32_t parts[4] = {};
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (2 * i < bytes) parts[i / 2] |= uint32_t(halves[i]) << 16 * (i % 2);
    }
    words = make_uint4(parts[0], parts[1], parts[2], parts[3]);
  }
  store_shared16(to, words);
#endif
}

// Copies all 16 bytes, or fills with zeros unless `inside`. That may be a predicate of the instruction, where a number
// of bytes takes three more instructions from sm_100 on.
__device__ __forceinline__ void copy_async16_if(bool inside, void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "{\n"
      ".reg .pred %%outside;\n"
      "setp.eq.s32 %%outside, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, %%outside;\n"
      "}" ::"r"(shared_address(to)),
      "l"(from), "r"(int(inside))
      : "memory");
#else
  copy_async16(to, from, inside ? 16 : 0);
#endif
}

// Closes the group of the copies that the thread has begun so far.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of this thread's groups, the latest ones, are on their way.
template <int pending> __device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// Loads four 8x8 matrices of 16-bit elements. Lanes 8i to 8i + 7 point to the rows of matrix i. Lane l gets, of each
// matrix or with `transposed` of its transpose, elements 2 (l % 4) and the next of row l / 4.
template <bool transposed> __device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t address = shared_address(row);
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

// d (16x8, float32) += a (16x16) b (16x8), with the fragments of mma.m16n8k16. Before sm_80 it is two products of half
// the depth.
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Float16) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  const uint32_t b[2] = {b0, b1};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
#endif
}

// The same for bfloat16. Tensor cores have it from sm_80 on, and product_plan.cuh and narrow.cu choose the kernels that
// call this nowhere else.
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                             BFloat16) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();
#endif
}

}  // namespace fastmlp::cuda
#endif

// What csrc/cuda/device.h writes as PTX, and the device functions of CUDA that the kernels call. Part of emulator.h.
#pragma once

inline void __syncthreads(int line = __builtin_LINE()) { emulator::synchronise_block(line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  if (mask != ~0u) emulator::fail("__syncwarp of part of a warp is not emulated");
  emulator::synchronise_warp(line, [] {});
}

template <class T> T __shfl_xor_sync(unsigned mask, T value, int flip, int line = __builtin_LINE()) {
  if (mask != ~0u) emulator::fail("__shfl_xor_sync of part of a warp is not emulated");
  return emulator::exchange<T>(value, line, [&](int lane, const T* given) { return given[lane ^ flip]; });
}

template <class T> T __shfl_down_sync(unsigned mask, T value, int distance, int line = __builtin_LINE()) {
  if (mask != ~0u) emulator::fail("__shfl_down_sync of part of a warp is not emulated");
  return emulator::exchange<T>(value, line, [&](int lane, const T* given) {
    return given[lane + distance < emulator::warp_size ? lane + distance : lane];
  });
}

// Stores of 8 and 16 bytes to global memory.
template <class T> void __stwb(T* to, T value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T) != 0) emulator::fail("a store of a vector is not aligned");
  std::memcpy(static_cast<void*>(to), &value, sizeof value);
}

// e^(x^2) erfc(x), which C++ does not have.
template <class T> T scaled_erfc(T x) {
  const long double v = x;
  if (v < 10) return T(std::exp(v * v) * std::erfc(v));
  // The asymptotic series: its terms shrink by more than 10 here.
  const long double step = -1 / (2 * v * v);
  long double sum = 1, term = 1;
  for (int k = 1; k <= 12; k++) sum += term *= step * (2 * k - 1);
  return T(sum / (v * 1.77245385090551602729816748334L));
}
inline float erfcxf(float x) { return scaled_erfc(x); }
inline double erfcx(double x) { return scaled_erfc(x); }

namespace fastmlp::cuda {

constexpr bool compiles_by_architecture = false;
template <Staging staging> constexpr Staging staging_of = staging;

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(Float16 x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, sizeof half);
  return float(half);
}
inline float widen(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

template <class S> struct Narrow {
  static S from(S x) { return x; }
};
template <> struct Narrow<Float16> {
  static Float16 from(float x) {
    const _Float16 half = _Float16(x);
    Float16 result;
    std::memcpy(&result.bits, &half, sizeof half);
    return result;
  }
};
template <> struct Narrow<BFloat16> {
  static BFloat16 from(float x) {
    const uint32_t bits = float_to_bits(x);
    if (x != x) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};

template <class S> uint32_t narrow_pair(float low, float high, S) {
  return uint32_t(Narrow<S>::from(low).bits) | uint32_t(Narrow<S>::from(high).bits) << 16;
}
template <class S> uint32_t narrow_pair_above_zero(float low, float high, S) {
  return narrow_pair(low < 0 ? 0 : low, high < 0 ? 0 : high, S{});
}
template <class S> uint32_t above_zero_mask(uint32_t pair, S) {
  return (widen(S{uint16_t(pair)}) <= 0 ? 0 : 0xffffu) | (widen(S{uint16_t(pair >> 16)}) <= 0 ? 0 : 0xffff0000u);
}

inline unsigned read_thread_index() { return threadIdx.x; }

inline void store_shared16(void* to, const uint4& words) { *static_cast<uint4*>(to) = words; }

inline void copy_async16(void* to, const void* from, int bytes) {
  const emulator::Unseen unseen;
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    emulator::fail("an address of an asynchronous copy is not aligned to 16 bytes");
  if (!emulator::is_shared(to)) emulator::fail("an asynchronous copy goes to memory that is not shared");
  if (bytes < 0 || bytes > 16) emulator::fail("an asynchronous copy of " + std::to_string(bytes) + " bytes");
  emulator::current->open.push_back({to, from, bytes});
}

inline void copy_async16_if(bool inside, void* to, const void* from) { copy_async16(to, from, inside ? 16 : 0); }

inline void commit_copies() {
  const emulator::Unseen unseen;
  emulator::current->groups.push_back(std::move(emulator::current->open));
  emulator::current->open.clear();
}

// The data arrives here, as late as it may.
template <int pending> void wait_for_copies() {
  std::vector<emulator::Copy> arriving;
  {
    const emulator::Unseen unseen;
    auto& groups = emulator::current->groups;
    while (int(groups.size()) > pending) {
      arriving.insert(arriving.end(), groups.front().begin(), groups.front().end());
      groups.erase(groups.begin());
    }
  }
  for (const emulator::Copy& copy : arriving) {
    unsigned char bytes[16] = {};
    if (copy.bytes > 0) std::memcpy(bytes, copy.from, size_t(copy.bytes));
    std::memcpy(copy.to, bytes, sizeof bytes);
  }
}

struct Words {
  uint32_t word[4];
};

template <bool transposed> void load_matrices(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0 || !emulator::is_shared(row))
    emulator::fail("ldmatrix takes rows in shared memory, aligned to 16 bytes");
  const auto combine = [](int lane, const void* const* given) {
    Words words;
    for (int matrix = 0; matrix < 4; matrix++) {
      uint16_t pair[2];
      for (int e = 0; e < 2; e++) {
        const int r = lane / 4, c = lane % 4 * 2 + e;
        const void* const from = given[8 * matrix + (transposed ? c : r)];
        pair[e] = static_cast<const uint16_t*>(from)[transposed ? r : c];
      }
      std::memcpy(&words.word[matrix], pair, sizeof pair);
    }
    return words;
  };
  const Words words = emulator::exchange<Words>(row, line, combine);
  std::memcpy(r, words.word, sizeof r);
}

// The fragments of mma.m16n8k16 in the PTX ISA: of lane l, with g = l / 4 and t = l % 4, a holds rows g and g + 8 and k
// 2t, 2t + 1, 2t + 8, 2t + 9; b the same k of column g; d rows g and g + 8, columns 2t and 2t + 1.
template <class S>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, S, int line = __builtin_LINE()) {
  struct Fragments {
    S a[8], b[4];
    float d[4];
  };
  struct Sums {
    float d[4];
  };
  Fragments fragments;
  const uint32_t b[2] = {b0, b1};
  std::memcpy(fragments.a, a, sizeof fragments.a);
  std::memcpy(fragments.b, b, sizeof fragments.b);
  std::memcpy(fragments.d, d, sizeof fragments.d);
  // One lane computes for all: what each gave is widened once.
  float rows[16][16], columns[8][16];
  const Fragments* widened = nullptr;
  const auto widen_all = [&](const Fragments* given) {
    for (int lane = 0; lane < emulator::warp_size; lane++) {
      const int g = lane / 4, t = lane % 4;
      for (int e = 0; e < 2; e++) {
        for (int high = 0; high < 2; high++) {
          const int k = 2 * t + e + 8 * high;
          rows[g][k] = widen(given[lane].a[4 * high + e]);
          rows[g + 8][k] = widen(given[lane].a[4 * high + 2 + e]);
          columns[g][k] = widen(given[lane].b[2 * high + e]);
        }
      }
    }
    widened = given;
  };
  const auto combine = [&](int lane, const Fragments* given) {
    if (widened != given) widen_all(given);
    Sums sums;
    for (int i = 0; i < 4; i++) {
      float sum = given[lane].d[i];
      for (int k = 0; k < 16; k++) sum += rows[lane / 4 + i / 2 * 8][k] * columns[lane % 4 * 2 + i % 2][k];
      sums.d[i] = sum;
    }
    return sums;
  };
  const Sums sums = emulator::exchange<Sums>(fragments, line, combine);
  std::memcpy(d, sums.d, sizeof d);
}

}  // namespace fastmlp::cuda

// What PTX instructions do, for the C++ that translate.py writes: tables.py names one function of this file for every
// opcode. Registers are variables of the type that they were declared with; as<T>() reads one as the instruction's
// type. Shared addresses are offsets into the block's shared memory; global, local and parameter addresses are the
// host's. Compiled with -ffp-contract=off: what is fused is fused in the PTX.
//
// The approximations (ex2.approx, rcp.approx, div.approx) are correctly rounded here, the hardware's err by a few units
// in the last place: what goes through them is compared with bounds, not bit by bit.
#pragma once

#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cuda/device.h"
#include "translated.h"

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;
using f32 = float;
using f64 = double;
using pred = bool;

// The value of a register, or an immediate, as the instruction's type: the same bits; from a wider register the low
// ones, into a wider one extended by the type's sign.
template <class T, class R> T as(R r) {
  if constexpr (std::is_same_v<T, R>) {
    return r;
  } else if constexpr (sizeof(T) == sizeof(R)) {
    return std::bit_cast<T>(r);
  } else {
    static_assert(std::is_integral_v<T> && std::is_integral_v<R>, "only integers change their width");
    return T(r);
  }
}

template <class T> constexpr int bits_of = int(8 * sizeof(T));

// ---- integers; sums and products wrap around

template <class T> using Unsigned = std::make_unsigned_t<T>;
template <class T> struct WiderOf;
template <> struct WiderOf<s16> {
  using Type = s32;
};
template <> struct WiderOf<u16> {
  using Type = u32;
};
template <> struct WiderOf<s32> {
  using Type = s64;
};
template <> struct WiderOf<u32> {
  using Type = u64;
};
template <> struct WiderOf<s64> {
  using Type = __int128;
};
template <> struct WiderOf<u64> {
  using Type = unsigned __int128;
};
template <class T> using Wider = typename WiderOf<T>::Type;

template <class T> T add(T a, T b) {
  if constexpr (std::is_integral_v<T>) return T(Unsigned<T>(a) + Unsigned<T>(b));
  return a + b;
}
template <class T> T sub(T a, T b) {
  if constexpr (std::is_integral_v<T>) return T(Unsigned<T>(a) - Unsigned<T>(b));
  return a - b;
}
template <class T> T neg(T a) {
  if constexpr (std::is_integral_v<T>) return T(0 - Unsigned<T>(a));
  return -a;
}
template <class T> Wider<T> mul_wide(T a, T b) { return Wider<T>(a) * Wider<T>(b); }
template <class T> T mul_lo(T a, T b) { return T(mul_wide(a, b)); }
template <class T> T mul_hi(T a, T b) { return T(mul_wide(a, b) >> bits_of<T>); }
template <class T> T mad_lo(T a, T b, T c) { return add(mul_lo(a, b), c); }
template <class T> T mad_hi(T a, T b, T c) { return add(mul_hi(a, b), c); }
template <class T> Wider<T> mad_wide(T a, T b, Wider<T> c) { return add(mul_wide(a, b), c); }

// The hardware gives ones for a division by zero, and no trap.
template <class T> T div(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    if (b == 0) return T(-1);
    if (std::is_signed_v<T> && b == T(-1)) return neg(a);
  }
  return a / b;
}
template <class T> T rem(T a, T b) {
  if (b == 0) return a;
  return std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
}
template <class T> T abs(T a) {
  if constexpr (std::is_integral_v<T>) return a < 0 ? neg(a) : a;
  return std::fabs(a);
}

// ---- sums of several words; `carry` is the thread's condition code

template <class T> T add_cc(bool& carry, T a, T b) {
  const T sum = add(a, b);
  carry = sum < a;
  return sum;
}
template <class T> T addc_cc(bool& carry, T a, T b) {
  const T in = carry, sum = add(a, b), all = add(sum, in);
  carry = sum < a || all < sum;
  return all;
}
template <class T> T addc(bool& carry, T a, T b) { return add(add(a, b), T(carry)); }
template <class T> T sub_cc(bool& carry, T a, T b) {
  carry = a < b;
  return sub(a, b);
}
template <class T> T subc_cc(bool& carry, T a, T b) {
  const T in = carry, difference = sub(a, b), all = sub(difference, in);
  carry = a < b || difference < in;
  return all;
}
template <class T> T subc(bool& carry, T a, T b) { return sub(sub(a, b), T(carry)); }
template <class T> T mad_lo_cc(bool& carry, T a, T b, T c) { return add_cc(carry, mul_lo(a, b), c); }
template <class T> T mad_hi_cc(bool& carry, T a, T b, T c) { return add_cc(carry, mul_hi(a, b), c); }
template <class T> T madc_lo_cc(bool& carry, T a, T b, T c) { return addc_cc(carry, mul_lo(a, b), c); }
template <class T> T madc_hi_cc(bool& carry, T a, T b, T c) { return addc_cc(carry, mul_hi(a, b), c); }
template <class T> T madc_lo(bool& carry, T a, T b, T c) { return addc(carry, mul_lo(a, b), c); }
template <class T> T madc_hi(bool& carry, T a, T b, T c) { return addc(carry, mul_hi(a, b), c); }

// ---- bits and predicates

template <class T> T bit_and(T a, T b) { return T(a & b); }
template <class T> T bit_or(T a, T b) { return T(a | b); }
template <class T> T bit_xor(T a, T b) { return T(a ^ b); }
template <class T> T bit_not(T a) {
  if constexpr (std::is_same_v<T, bool>) return !a;
  return T(~a);
}
// Shifts by more than the width are by all of it.
template <class T> T shl(T a, u32 count) { return count >= u32(bits_of<T>) ? T(0) : T(a << count); }
template <class T> T shr(T a, u32 count) {
  if (count < u32(bits_of<T>)) return T(a >> count);
  return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
}
// The high word of two that are shifted to the left.
inline u32 shf_l_wrap(u32 low, u32 high, u32 count) { return u32((u64(high) << 32 | low) << (count & 31) >> 32); }
// The low `length` bits of a in place of those of b from `position` on.
template <class T> T bfi(T a, T b, u32 position, u32 length) {
  position &= 0xff;
  length &= 0xff;
  const T ones = length >= u32(bits_of<T>) ? T(-1) : T((T(1) << length) - 1);
  const T mask = shl(ones, position);
  return T((b & ~mask) | (shl(a, position) & mask));
}
template <class T> u32 clz(T a) { return u32(std::countl_zero(a)); }
// Bytes of two words by their numbers in the selector's digits; of a digit from 8 on the byte's sign.
inline u32 prmt(u32 a, u32 b, u32 selector) {
  const u64 bytes = u64(b) << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    const u32 digit = selector >> 4 * i & 0xf;
    const u8 byte = u8(bytes >> 8 * (digit & 7));
    result |= u32(digit < 8 ? byte : byte & 0x80 ? 0xff : 0) << 8 * i;
  }
  return result;
}
template <class T> T mov(T a) { return a; }
template <class T> T selp(T a, T b, bool p) { return p ? a : b; }

// ---- floating point, rounded to nearest even unless the name says otherwise

template <class T> T mul(T a, T b) { return a * b; }
template <class T> T fma(T a, T b, T c) { return std::fma(a, b, c); }
template <class T> T rcp(T a) { return 1 / a; }
template <class T> T copysign(T sign, T value) { return std::copysign(value, sign); }
// A number if one is a number; -0 is less than +0.
template <class T> T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a || b != b) return a != a ? b : a;
    if (a == b) return std::signbit(a) ? a : b;
  }
  return a < b ? a : b;
}
template <class T> T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a || b != b) return a != a ? b : a;
    if (a == b) return std::signbit(a) ? b : a;
  }
  return a > b ? a : b;
}

// What a + b is exactly, as the double nearest to it and the rest (Knuth's sum).
struct ExactSum {
  double value, rest;
  ExactSum(double a, double b) : value(a + b) {
    const double part = value - a;
    rest = (a - (value - part)) + (b - part);
  }
};
// Of the float32 numbers around an exact value the lower one, or the one nearer to zero.
inline f32 round_down(ExactSum exact) {
  const f32 nearest = f32(exact.value);
  if (!std::isfinite(exact.value)) return nearest;
  if (std::isinf(nearest) && nearest > 0) return std::numeric_limits<f32>::max();
  const bool above = double(nearest) > exact.value || (double(nearest) == exact.value && exact.rest < 0);
  return above ? std::nextafter(nearest, -std::numeric_limits<f32>::infinity()) : nearest;
}
inline f32 round_to_zero(ExactSum exact) {
  if (exact.value >= 0) return exact.value == 0 ? f32(exact.value) : round_down(exact);
  exact.value = -exact.value;
  exact.rest = -exact.rest;
  return -round_down(exact);
}
// Products of two float32 numbers are exact in float64.
inline f32 fma_rm(f32 a, f32 b, f32 c) { return round_down(ExactSum(f64(a) * b, c)); }
inline f32 add_rz(f32 a, f32 b) { return round_to_zero(ExactSum(a, b)); }
inline f32 mul_rz(f32 a, f32 b) { return round_to_zero(ExactSum(f64(a) * b, 0)); }

template <class T> T flush(T a) { return std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(T(0), a) : a; }
inline f32 ex2_approx(f32 a) { return f32(std::exp2(f64(a))); }
inline f32 ex2_approx_ftz(f32 a) { return flush(ex2_approx(flush(a))); }
inline f32 rcp_approx_ftz(f32 a) { return flush(1 / flush(a)); }
inline f32 div_approx(f32 a, f32 b) { return a / b; }
// From and to the upper halves of a double: the lower ones are not read, and written as zero.
inline f64 rcp_approx_ftz(f64 a) {
  const auto upper = [](f64 x) { return std::bit_cast<f64>(std::bit_cast<u64>(x) >> 32 << 32); };
  return flush(upper(1 / flush(upper(a))));
}

// ---- comparisons; those with u at the end are true of NaN

template <class T> bool eq(T a, T b) { return a == b; }
template <class T> bool ne(T a, T b) { return a < b || a > b; }
template <class T> bool lt(T a, T b) { return a < b; }
template <class T> bool le(T a, T b) { return a <= b; }
template <class T> bool gt(T a, T b) { return a > b; }
template <class T> bool ge(T a, T b) { return a >= b; }
template <class T> bool equ(T a, T b) { return !ne(a, b); }
template <class T> bool neu(T a, T b) { return !(a == b); }
template <class T> bool ltu(T a, T b) { return !(a >= b); }
template <class T> bool leu(T a, T b) { return !(a > b); }
template <class T> bool gtu(T a, T b) { return !(a <= b); }
template <class T> bool geu(T a, T b) { return !(a < b); }

// ---- conversions

template <class T, class S> T convert(S a) { return T(a); }
// Out of range to the nearest; NaN to zero.
template <class T, class S> T to_nearest_integer(S a) {
  const S rounded = std::nearbyint(a);
  if (a != a) return 0;
  if (rounded < S(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (rounded >= -S(std::numeric_limits<T>::min())) return std::numeric_limits<T>::max();
  return T(rounded);
}
inline f32 round_to_integer(f32 a) { return std::nearbyint(a); }
inline f32 saturate(f32 a) { return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f; }
inline f32 from_half(b16 a) { return fastmlp::cuda::widen(fastmlp::Float16{a}); }
inline b16 to_half(f32 a) { return a != a ? b16(0x7fff) : fastmlp::cuda::Narrow<fastmlp::Float16>::from(a).bits; }
inline b16 to_bfloat16(f32 a) { return fastmlp::cuda::Narrow<fastmlp::BFloat16>::from(a).bits; }

// Two numbers to the halves of a word; of those that are negative, zero.
template <class S> u32 to_pair(f32 high, f32 low) { return fastmlp::cuda::narrow_pair(low, high, S{}); }
template <class S> u32 to_pair_above_zero(f32 high, f32 low) {
  return fastmlp::cuda::narrow_pair_above_zero(low, high, S{});
}
// Ones in the halves of a word where a is greater than b, or one of them NaN.
template <class S> u32 gtu_mask(u32 a, u32 b) {
  u32 mask = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const f32 of_a = fastmlp::cuda::widen(S{u16(a >> shift)}), of_b = fastmlp::cuda::widen(S{u16(b >> shift)});
    mask |= gtu(of_a, of_b) ? 0xffffu << shift : 0;
  }
  return mask;
}

// Two halves of a register, the low one first.
template <class W, class H> W pack(H low, H high) { return W(W(low) | W(high) << bits_of<H>); }

// ---- memory; `line` is that of the PTX

enum class Space { global, shared, local, param };

template <size_t bytes> void* at(u64 address, int line) {
  if (address % bytes != 0)
    emulator::fail("PTX line " + std::to_string(line) + ": an access of " + std::to_string(bytes) +
                   " bytes is misaligned");
  return reinterpret_cast<void*>(address);
}
inline u64 address_of(const void* p) { return reinterpret_cast<u64>(p); }
inline u64 shared_address(u32 offset, size_t bytes, int line) {
  if (offset + bytes > emulator::block->used)
    emulator::fail("PTX line " + std::to_string(line) + ": an access behind the end of shared memory");
  return address_of(emulator::block->arena) + offset;
}
inline u32 shared_offset(void* p) { return u32(static_cast<unsigned char*>(p) - emulator::block->arena); }

// Elements one after another, as v2 and v4 instructions take them.
template <class T, int count> struct Elements {
  T element[count];
};

template <Space space, class T, int count> Elements<T, count> load(u64 address, int line) {
  constexpr size_t bytes = sizeof(T) * count;
  if constexpr (space == Space::shared) address = shared_address(u32(address), bytes, line);
  const auto* const from = static_cast<const T*>(at<bytes>(address, line));
  if constexpr (space == Space::shared || space == Space::global)
    emulator::note_access(line, address, bytes, space == Space::shared);
  Elements<T, count> loaded;
  for (int i = 0; i < count; i++) loaded.element[i] = from[i];
  return loaded;
}

template <Space space, class T, int count> void store(u64 address, int line, const Elements<T, count>& elements) {
  constexpr size_t bytes = sizeof(T) * count;
  if constexpr (space == Space::shared) address = shared_address(u32(address), bytes, line);
  auto* const to = static_cast<T*>(at<bytes>(address, line));
  if constexpr (space == Space::shared || space == Space::global)
    emulator::note_access(line, address, bytes, space == Space::shared);
  for (int i = 0; i < count; i++) to[i] = elements.element[i];
}

// A module's or a kernel's .shared variable: its offset, aligned as it says and no better.
inline u32 shared_variable(const char* name, size_t bytes, size_t alignment) {
  return shared_offset(emulator::shared_object(name, bytes, alignment));
}

// The launch's shared memory, which the emulator aligns to 128, as device.h declares it, and no better.
inline u32 dynamic_shared_variable(size_t alignment) {
  if (alignment != 128)
    emulator::fail("dynamic shared memory is declared aligned to " + std::to_string(alignment) + ", not to 128");
  if (!emulator::block->dynamic) emulator::fail("a kernel without dynamic shared memory from its launch uses it");
  return shared_offset(emulator::block->dynamic);
}

// ---- warps and blocks

inline void bar_sync(u32 barrier, int line) {
  if (barrier != 0) emulator::fail("bar.sync of another barrier than 0");
  emulator::synchronise_block(line);
}
[[noreturn]] inline void trap(int line) { emulator::fail("trap in line " + std::to_string(line)); }

// `to` is a shared, `from` a global address.
inline void cp_async16(u32 to, u64 from, u32 bytes, int line) {
  const u64 target = shared_address(to, 16, line);
  emulator::note_access(line, target, 16, true);
  if (bytes > 0) emulator::note_access(line, from, bytes, false);
  fastmlp::cuda::copy_async16(reinterpret_cast<void*>(target), reinterpret_cast<const void*>(from), int(bytes));
}

template <bool transposed> Elements<u32, 4> ldmatrix(u32 row, int line) {
  const u64 address = shared_address(row, 16, line);
  emulator::note_access(line, address, 16, true);
  u32 fragment[4];
  fastmlp::cuda::load_matrices<transposed>(fragment, reinterpret_cast<const void*>(address), line);
  return {{fragment[0], fragment[1], fragment[2], fragment[3]}};
}

template <class S>
Elements<f32, 4> mma_m16n8k16(const Elements<u32, 4>& a, const Elements<u32, 2>& b, const Elements<f32, 4>& c,
                              int line) {
  Elements<f32, 4> d = c;
  fastmlp::cuda::multiply_add(d.element, a.element, b.element[0], b.element[1], S{}, line);
  return d;
}
// Half the depth: the other half are zeros, which change no sum.
template <class S>
Elements<f32, 4> mma_m16n8k8(const Elements<u32, 2>& a, const Elements<u32, 1>& b, const Elements<f32, 4>& c,
                             int line) {
  return mma_m16n8k16<S>({{a.element[0], a.element[1], 0, 0}}, {{b.element[0], 0}}, c, line);
}

}  // namespace ptx
